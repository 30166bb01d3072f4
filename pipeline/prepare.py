"""Stage `prepare`: download and verify the images, or read your own, split them, and write them to data/prepared."""

import sys
from concurrent.futures import ThreadPoolExecutor

from pipeline import files
from pipeline.data import contact_sheets, own_pictures, sources, splits, splitting, summary
from pipeline.data.image_files import Preprocessing
from pipeline.data.own_pictures import OwnPictures
from pipeline.data.splits import TRAIN, Prepared
from pipeline.errors import run_command
from pipeline.params import Data, read_params
from pipeline.stage_inputs import StageInputs


def main() -> None:
    """Read params.yaml and the published files, or a folder of pictures; write data/prepared and what it holds."""
    inputs = StageInputs("prepare")
    params = read_params().data
    own = _own_pictures(params) if params.dataset == sources.FOLDER else None
    prepared = own.prepared if own else _published(params)
    rows = own.rows if own else ()
    warnings = [
        *splits.check(prepared.splits, prepared.name, prepared.class_names),
        *([] if own else splits.copy_warnings(prepared.splits)),
        *summary.image_warnings(prepared, rows),
    ]
    for warning in warnings:
        print(f"warning: {prepared.name}: {warning}", file=sys.stderr)
    inputs.check_unchanged()
    if own is None:
        files.IMAGES.unlink(missing_ok=True)  # of other pictures
    with ThreadPoolExecutor(1) as thread:
        sheets = thread.submit(contact_sheets.write, prepared)
        dataset = splits.write_splits(prepared)
    told = summary.summary(prepared, rows, sheets.result(), [*warnings, *(own.data_warnings if own else ())])
    files.write_json(files.SUMMARY, told)
    inputs.check_unchanged()
    counts = ", ".join(f"{facts.count:,} {split}" for split, facts in dataset.splits.items())
    shape = " x ".join(str(side) for side in dataset.image_shape)
    print(f"{dataset.name}: {counts} images of {shape}, {len(dataset.class_names)} classes -> {files.PREPARED}")


def _published(params: Data) -> Prepared:
    """A data set of the table DATASETS."""
    name, source = sources.load(params.dataset, params.offline_fallback)
    if source.test is None:
        made = splitting.split(
            source.train,
            source.class_names,
            near_duplicates=params.near_duplicates,
            validation_fraction=params.validation_fraction,
            test_fraction=params.test_fraction,
            seed=params.split_seed,
        )
    else:
        made = splits.cut(source.train, source.test, validation_fraction=params.validation_fraction)
    height, width, channels = made[TRAIN].images.shape[1:]
    preprocessing = Preprocessing(sources.DATASETS[name].resize, (height, width, channels))
    return Prepared(made, name, params.dataset, source.origin, source.class_names, preprocessing)


def _own_pictures(params: Data) -> OwnPictures:
    """The folder that params.yaml names. Writes a table of its pictures, and prints what a person should know."""
    own = own_pictures.prepare(params)
    files.write_table(files.IMAGES, [vars(row) for row in own.rows])
    for line in own.left_out:
        print(line)
    for line in own.warnings:
        print(f"warning: {own.prepared.name}: {line}", file=sys.stderr)
    return own


if __name__ == "__main__":
    run_command(main)
