"""Stage `train`: fit the CNN on the training images, watch it on the validation images, log it to MLflow."""

from collections.abc import Callable
from dataclasses import asdict
from typing import NoReturn

from tqdm import tqdm

from pipeline import checkpoints, dvc_files, files, recipe
from pipeline.checkpoints import SavedTraining
from pipeline.data.splits import TRAIN, VALIDATION, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, run_command
from pipeline.explain.live_images import LiveImages
from pipeline.model import model_file, training
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN, summary
from pipeline.model.training import Epoch
from pipeline.params import Params, read_params
from pipeline.stage_inputs import StageInputs
from pipeline.tracking import runs, store
from pipeline.tracking.runs import TrainingRun


def main() -> None:
    """Read params.yaml and two of the splits; write the model and the history of its training."""
    inputs = StageInputs("train")
    params, dataset = read_params(), read_dataset()
    device = recipe.device_for(params)
    limit = params.data.memory_limit
    train, validation = (read_split(dataset, split, memory_limit=limit).to(device) for split in (TRAIN, VALIDATION))
    cnn = recipe.build(params, dataset)
    print(summary(cnn.architecture), flush=True)

    for folder in (files.MODEL.parent, files.HISTORY.parent, files.checkpoints_folder()):
        files.check_writable(folder)
    store.connect()
    runs.close_stale_runs()
    fingerprint = checkpoints.fingerprint(params, dataset, device)
    if run_id := _already_trained(fingerprint):
        print(f"{files.MODEL} was trained by the MLflow run {run_id}, which ended before DVC recorded it")
    else:
        interrupted = checkpoints.find(fingerprint, cnn)
        continues = interrupted.run_id if interrupted else None
        with runs.training_run(params, dataset, device, fingerprint, continues) as run:
            history = _fit(cnn, train, validation, params, run, fingerprint, interrupted)
            inputs.check_unchanged()
            print("looking at the features of the training images, to tell unfamiliar pictures later", flush=True)
            model = model_file.to_bytes(recipe.trained(cnn, train, validation, params, dataset))
            files.write(files.MODEL, model)
            files.write_table(files.HISTORY, [_row(epoch) for epoch in history])
            run.describe_model(cnn, dataset, files.sha256(model))
    inputs.check_unchanged()
    checkpoints.remove(fingerprint)
    print(f"{files.MODEL}: SHA-256 {files.sha256(files.MODEL.read_bytes())[:12]}..., trained on {dataset.label}")


def _already_trained(fingerprint: str) -> str | None:
    """The run of a training that ended, but was killed before DVC had recorded what it wrote."""
    if not files.runs_in_dvc() or not files.MODEL.exists() or not files.HISTORY.exists():
        return None
    model = files.MODEL.read_bytes()
    return None if dvc_files.has_noted(files.MODEL, model) else runs.finished_run(fingerprint, files.sha256(model))


def _fit(
    cnn: CNN,
    train: LabelledImages,
    validation: LabelledImages,
    params: Params,
    run: TrainingRun,
    fingerprint: str,
    interrupted: SavedTraining | None,
) -> list[Epoch]:
    """Train to the last epoch, resuming from ``interrupted`` if there is one; returns the history of all epochs."""
    history = list(interrupted.history) if interrupted else []
    for epoch in history:
        run.log_epoch(epoch)
    live_images = LiveImages(cnn, params.visualize.maximisation) if params.train.live_images else None
    if live_images and not interrupted:
        run.log_images(0, live_images.now())  # before any training

    def save_checkpoint(reached: Checkpoint) -> None:
        checkpoints.save(fingerprint, reached, history, run.run_id)

    resume_from = interrupted.checkpoint if interrupted else None
    if interrupted:
        print(f"resuming an interrupted training after epoch {len(history)} of {params.train.epochs}", flush=True)
    with _progress_bar(params, len(train), resume_from) as bar:
        on_step = _shows_on(bar, on_cpu=train.images.device.type == "cpu")
        try:
            for epoch in recipe.fit(
                cnn,
                train,
                validation,
                params,
                on_step=on_step,
                resume_from=resume_from,
                save_checkpoint=save_checkpoint,
            ):
                history.append(epoch)
                run.log_epoch(epoch)
                if live_images:
                    run.log_images(epoch.epoch, live_images.after_epoch())
                bar.write(_line(epoch, params.train.epochs))
        except training.DivergedError as error:
            raise Fault(
                f"{error}: try a lower train.learning_rate than {params.train.learning_rate:g} in params.yaml"
            ) from error
    return history


def _progress_bar(params: Params, count: int, resume_from: Checkpoint | None) -> "tqdm[NoReturn]":
    """A bar of the images of all epochs, on a terminal only."""
    seen = resume_from.epoch * count + resume_from.step * params.train.batch_size if resume_from else 0
    return tqdm(total=params.train.epochs * count, initial=seen, unit=" images", unit_scale=True, disable=None)


def _shows_on(bar: "tqdm[NoReturn]", on_cpu: bool) -> Callable[[training.Step], None]:
    """A function that shows a training step on the bar."""

    def on_step(step: training.Step) -> None:
        # update() is True a few times a second, on a terminal only. Reading the loss of a GPU would wait for it.
        if bar.update(step.images) and on_cpu:
            bar.set_postfix(loss=f"{step.loss():.3f}", accuracy=f"{step.accuracy():.0%}")

    return on_step


def _line(epoch: Epoch, epochs: int) -> str:
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}"
        f"  train loss {epoch.train_loss:.4f}, accuracy {epoch.train_accuracy:.2%}"
        f"  validation loss {epoch.validation_loss:.4f}, accuracy {epoch.validation_accuracy:.2%}"
        f" (balanced {epoch.validation_balanced_accuracy:.2%})"
        f"  {epoch.seconds:.1f} s"
    )


def _row(epoch: Epoch) -> dict[str, object]:
    """A row of history.csv. It leaves out the seconds, so that the same inputs give the same bytes.

    The balanced accuracy is in MLflow alone: others read this file, whose columns stay.
    """
    return {
        key: value for key, value in asdict(epoch).items() if key not in ("seconds", "validation_balanced_accuracy")
    }


if __name__ == "__main__":
    run_command(main)
