"""Stage `visualize`: draw how the training went, what the model learned, and where it fails."""

from pathlib import Path

from pipeline import files
from pipeline.data.splits import TEST, TRAIN, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.explain import report
from pipeline.figures.canvas import as_png
from pipeline.model import model_file
from pipeline.params import read_params
from pipeline.tracking import runs, store


def main() -> None:
    """Read the model, its history and its predictions, and two splits; write reports/figures and reports/plots."""
    params = read_params()
    dataset = read_dataset()
    model = files.read(files.MODEL, made_by="train")
    saved = model_file.from_bytes(model, str(files.MODEL))
    store.connect()  # before the drawing, which takes longer than to find that the store is closed
    inputs = report.ReportInputs(
        saved.cnn,
        dataset,
        read_split(dataset, TRAIN),
        read_split(dataset, TEST),
        files.read_table(files.HISTORY, made_by="train"),
        files.read_table(files.PREDICTIONS, made_by="evaluate"),
        params.visualize,
        params.evaluate.calibration_bins,
    )
    pictures = []
    for name, figure in report.figures(inputs):
        pictures.append(files.FIGURES / f"{name}.png")
        files.write(pictures[-1], as_png(figure))
    tables = []
    for name, rows in report.tables(inputs).items():
        tables.append(files.PLOTS / f"{name}.csv")
        files.write_table(tables[-1], rows)
    _clear(files.FIGURES, pictures)
    _clear(files.PLOTS, tables)

    runs.close_stale_runs()
    run_id = runs.find_or_restore(files.sha256(model), saved, dataset, inputs.history)
    runs.log_files(run_id, pictures, "figures")
    print(f"{len(pictures)} figures of a model trained on {dataset.label} -> {files.FIGURES}")


def _clear(folder: Path, written: list[Path]) -> None:
    """Remove what an earlier version of this stage has left."""
    for stale in set(folder.iterdir()) - set(written):
        stale.unlink()


if __name__ == "__main__":
    run_command(main)
