"""Stage `train`: fit the CNN on the training images, watch it on the validation images, log it to MLflow."""

from dataclasses import asdict

from tqdm import tqdm

from pipeline import files, recipe
from pipeline.errors import Fault, run_command
from pipeline.images.splits import TRAIN, VALIDATION, LabelledImages, read_dataset, read_split
from pipeline.network import model_file, training
from pipeline.network.cnn import CNN, summary
from pipeline.params import Params, read_params
from pipeline.tracking import runs


def main() -> None:
    """Read params.yaml and two of the splits; write the model and the history of its training."""
    params = read_params()
    dataset = read_dataset()
    device = recipe.device_for(params)
    train, validation = (read_split(dataset, split).to(device) for split in (TRAIN, VALIDATION))
    cnn = recipe.build(params, dataset)
    print(summary(cnn.architecture), flush=True)

    runs.connect()
    with runs.training_run(params, dataset):
        history = _fit(cnn, train, validation, params)
        model = model_file.to_bytes(cnn, dataset.tags, params.recipe)
        model_sha256 = files.sha256(model)
        files.write(files.MODEL, model)
        files.write_table(files.HISTORY, [_row(epoch) for epoch in history])
        runs.describe_model(cnn, dataset, model_sha256)
    print(f"{files.MODEL}: SHA-256 {model_sha256[:12]}..., trained on {dataset.label}")


def _fit(cnn: CNN, train: LabelledImages, validation: LabelledImages, params: Params) -> list[training.Epoch]:
    """Train to the end, with a bar on a terminal and a line an epoch anywhere."""
    history = []
    device = train.images.device
    with tqdm(total=params.train.epochs * len(train), unit=" images", unit_scale=True, disable=None) as bar:

        def on_step(step: training.Step) -> None:
            # True a few times a second, on a terminal only. A GPU would have to be waited for to tell the loss.
            if bar.update(step.images) and device.type == "cpu":
                bar.set_postfix(loss=f"{step.loss():.3f}", accuracy=f"{step.accuracy():.0%}")

        try:
            for epoch in recipe.fit(cnn, train, validation, params, on_step):
                history.append(epoch)
                runs.log_epoch(epoch)
                bar.write(_line(epoch, params.train.epochs))
        except training.DivergedError as error:
            raise Fault(
                f"{error}: try a lower train.learning_rate than {params.train.learning_rate:g} in params.yaml"
            ) from error
    return history


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
