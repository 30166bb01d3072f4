"""Stage `train`: fit the CNN on the training images, watch it on the validation images, log it to MLflow."""

from dataclasses import asdict

from tqdm import tqdm

from pipeline import checkpoints, dvc_files, files, recipe
from pipeline.checkpoints import SavedTraining
from pipeline.data.splits import TRAIN, VALIDATION, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, run_command
from pipeline.explain.live_images import LiveImages
from pipeline.model import model_file, training
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.cnn import CNN, summary
from pipeline.params import Params, read_params
from pipeline.tracking import runs
from pipeline.tracking.runs import TrainingRun


def main() -> None:
    """Read params.yaml and two of the splits; write the model and the history of its training."""
    params = read_params()
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation = (read_split(dataset, split).to(device) for split in (TRAIN, VALIDATION))
    cnn = recipe.build(params, dataset)
    print(summary(cnn.architecture), flush=True)

    for folder in (files.MODEL.parent, files.HISTORY.parent, files.checkpoints_folder()):
        files.check_writable(folder)
    runs.connect()
    runs.close_stale_runs()
    fingerprint = checkpoints.fingerprint(params, dataset, device)
    if run_id := _already_trained(fingerprint):
        print(f"{files.MODEL} was trained by the MLflow run {run_id}, which ended before DVC knew of it")
    else:
        before = checkpoints.find(fingerprint)
        continues = before.run_id if before else None
        with runs.training_run(params, dataset, device, fingerprint, continues) as run:
            history = _fit(cnn, train, validation, params, run, fingerprint, before)
            model = model_file.to_bytes(cnn, dataset.tags, params.recipe)
            files.write(files.MODEL, model)
            files.write_table(files.HISTORY, [_row(epoch) for epoch in history])
            run.describe_model(cnn, dataset, files.sha256(model))
    checkpoints.remove(fingerprint)
    print(f"{files.MODEL}: SHA-256 {files.sha256(files.MODEL.read_bytes())[:12]}..., trained on {dataset.label}")


def _already_trained(fingerprint: str) -> str | None:
    """The run of a training that came to its end, but was killed before DVC had noted what it wrote."""
    if not files.runs_in_dvc() or not files.MODEL.exists() or not files.HISTORY.exists():
        return None
    model = files.MODEL.read_bytes()
    return None if dvc_files.has_noted(files.MODEL, model) else runs.has_given(fingerprint, files.sha256(model))


def _fit(
    cnn: CNN,
    train: LabelledImages,
    validation: LabelledImages,
    params: Params,
    run: TrainingRun,
    fingerprint: str,
    before: SavedTraining | None,
) -> list[training.Epoch]:
    """Train to the end, with a bar on a terminal and a line an epoch anywhere; where ``before`` ended, if at all."""
    history = list(before.history) if before else []
    for epoch in history:
        run.log_epoch(epoch)
    if before:
        print(f"an interrupted training goes on after epoch {len(history)} of {params.train.epochs}", flush=True)
    seen = sum(_images_seen(before.checkpoint, params, len(train))) if before else 0
    device = train.images.device
    images = params.train.epochs * len(train)
    with tqdm(total=images, initial=seen, unit=" images", unit_scale=True, disable=None) as bar:

        def on_step(step: training.Step) -> None:
            # True a few times a second, on a terminal only. A GPU would have to be waited for to tell the loss.
            if bar.update(step.images) and device.type == "cpu":
                bar.set_postfix(loss=f"{step.loss():.3f}", accuracy=f"{step.accuracy():.0%}")

        def keep(reached: Checkpoint) -> None:
            checkpoints.save(fingerprint, reached, history, run.run_id)

        start = before.checkpoint if before else None
        pictures = LiveImages(cnn, params.visualize.maximisation) if params.train.live_images else None
        if pictures and not before:
            run.show(0, pictures.now())  # what it begins with
        try:
            for epoch in recipe.fit(cnn, train, validation, params, on_step, start, keep):
                history.append(epoch)
                run.log_epoch(epoch)
                if pictures:
                    run.show(epoch.epoch, pictures.after_epoch())
                bar.write(_line(epoch, params.train.epochs))
        except training.DivergedError as error:
            raise Fault(
                f"{error}: try a lower train.learning_rate than {params.train.learning_rate:g} in params.yaml"
            ) from error
    return history


def _images_seen(reached: Checkpoint, params: Params, count: int) -> tuple[int, int]:
    """In whole passes, and in the one that was begun."""
    return reached.epoch * count, reached.step * params.train.batch_size


def _line(epoch: training.Epoch, epochs: int) -> str:
    return (
        f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}"
        f"  train loss {epoch.train_loss:.4f}, accuracy {epoch.train_accuracy:.2%}"
        f"  validation loss {epoch.validation_loss:.4f}, accuracy {epoch.validation_accuracy:.2%}"
        f"  {epoch.seconds:.1f} s"
    )


def _row(epoch: training.Epoch) -> dict[str, object]:
    """A row of history.csv. Without the seconds: the same inputs give the same bytes, however long they take."""
    return {key: value for key, value in asdict(epoch).items() if key != "seconds"}


if __name__ == "__main__":
    run_command(main)
