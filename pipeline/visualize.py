"""Stage `visualize`: draw how the training went, what the model learned, and where it fails."""

from pathlib import Path

from tqdm import tqdm

from pipeline import files
from pipeline.data.splits import TEST, TRAIN, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.explain import report
from pipeline.explain.report_inputs import ReportInputs
from pipeline.figures.canvas import as_png
from pipeline.model import model_file
from pipeline.params import check_model, read_params
from pipeline.stage_inputs import StageInputs
from pipeline.tracking import runs, store


def main() -> None:
    """Read the model, its history and its predictions, and two splits; write reports/figures and reports/plots."""
    stage_inputs = StageInputs("visualize")
    params = read_params()
    dataset = read_dataset()
    model = files.read(files.MODEL, made_by="train")
    saved = model_file.from_bytes(model, str(files.MODEL), check_model)
    store.connect()  # before the drawing: a store that cannot be reached is reported at once
    inputs = ReportInputs(
        saved.cnn,
        dataset,
        read_split(dataset, TRAIN, memory_limit=params.data.memory_limit),
        read_split(dataset, TEST, memory_limit=params.data.memory_limit),
        files.read_table(files.HISTORY, made_by="train"),
        files.read_table(files.PREDICTIONS, made_by="evaluate"),
        params.visualize,
        params.evaluate.calibration_bins,
        saved.recipe,
    )
    pictures = _draw(inputs)
    for name, rows in report.TABLES.items():
        files.write_table(files.PLOTS / f"{name}.csv", rows(inputs))
    for figure in files.own_figures():
        if figure not in pictures:
            figure.unlink()  # an earlier version of this stage drew it, or it showed another model

    runs.close_stale_runs()
    run_id = runs.find_or_restore(files.sha256(model), saved, dataset, inputs.history)
    runs.log_files(run_id, pictures, "figures")
    stage_inputs.check_unchanged()
    print(f"{len(pictures)} figures of a model trained on {dataset.label} -> {files.FIGURES}")


def _draw(inputs: ReportInputs) -> list[Path]:
    """Write the figures, one at a time since they are large, and show the progress on a terminal."""
    pictures = []
    figures = report.figures_of(inputs)
    print(f"drawing {len(figures)} figures, the slow ones last", flush=True)
    with tqdm(figures.items(), unit=" figures", disable=None) as bar:
        for name, draw in bar:
            bar.set_description(name)
            pictures.append(files.FIGURES / f"{name}.png")
            files.write(pictures[-1], as_png(draw(inputs)))
    return pictures


if __name__ == "__main__":
    run_command(main)
