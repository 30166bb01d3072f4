"""The stage `train` without MLflow: the same training, checkpoints and files, but no run and no live images.

    python -m bench.contenders.convtrack_untracked

Runs in a workspace with params.yaml and the prepared images. bench/stages.py compares its time with the stage's.
"""

from dataclasses import asdict

from pipeline import checkpoints, files, recipe
from pipeline.data.splits import TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import run_command
from pipeline.model import model_file
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.training import Epoch
from pipeline.params import read_params


def main() -> None:
    """Read params.yaml and two of the splits; write the model and the history of its training."""
    params = read_params()
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation = (read_split(dataset, split).to(device) for split in (TRAIN, VALIDATION))
    cnn = recipe.build(params, dataset)
    fingerprint = checkpoints.fingerprint(params, dataset, device)
    files.checkpoints_folder().mkdir(exist_ok=True)
    history = list[Epoch]()

    def save(reached: Checkpoint) -> None:
        checkpoints.save(fingerprint, reached, history, "")

    for epoch in recipe.fit(cnn, train, validation, params, save_checkpoint=save):
        history.append(epoch)
    files.write(files.MODEL, model_file.to_bytes(recipe.trained(cnn, train, validation, params, dataset)))
    files.write_table(files.HISTORY, [asdict(epoch) for epoch in history])
    checkpoints.remove(fingerprint)


if __name__ == "__main__":
    run_command(main)
