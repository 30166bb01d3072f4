"""Stage `prepare`: download and verify the images, split them, and write the splits to data/prepared."""

import sys

from pipeline import files
from pipeline.data import sources, splits
from pipeline.errors import run_command
from pipeline.params import read_params
from pipeline.stage_inputs import StageInputs


def main() -> None:
    """Read params.yaml and the published files; write data/prepared."""
    inputs = StageInputs("prepare")
    params = read_params().data
    name, source = sources.load(params.dataset, params.offline_fallback)
    cut = splits.cut(
        source.train,
        source.test,
        validation_fraction=params.validation_fraction,
        test_fraction=params.test_fraction,
        seed=params.split_seed,
    )
    for warning in splits.check(cut, name, source.class_names):
        print(f"warning: {name}: {warning}", file=sys.stderr)
    inputs.check_unchanged()
    dataset = splits.write_splits(
        cut,
        files.PREPARED,
        name=name,
        requested=params.dataset,
        source=source.origin,
        class_names=source.class_names,
    )
    inputs.check_unchanged()
    counts = ", ".join(f"{facts.count:,} {split}" for split, facts in dataset.splits.items())
    shape = " x ".join(str(side) for side in dataset.image_shape)
    print(f"{dataset.name}: {counts} images of {shape}, {len(dataset.class_names)} classes -> {files.PREPARED}")


if __name__ == "__main__":
    run_command(main)
