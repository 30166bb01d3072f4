"""Models for the registry without training each, for its tests."""

from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline import evaluate, files
from pipeline.data.splits import TEST, Dataset, read_dataset, read_split
from pipeline.model import model_file
from pipeline.params import Evaluate
from pipeline.tracking import promotion
from pipeline.tracking.promotion import Registration
from pipeline.tracking.registry import Entry

NAME = "mnist-5k-cnn"
NO_RULES = Evaluate()


def version(number: int | str) -> ModelVersion:
    return MlflowClient().get_model_version(NAME, str(number))


def aliases() -> dict[str, str]:
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model(NAME).aliases.items()}


class Candidates:
    """Registers models as `evaluate` does, with made-up predictions."""

    def __init__(self) -> None:
        evaluate.main()
        self.saved = model_file.from_bytes(files.MODEL.read_bytes())
        self.dataset = read_dataset()
        self.test = read_split(self.dataset, TEST)
        MlflowClient().delete_registered_model(NAME)

    def register(self, model: str, errors: int, dataset: Dataset | None = None, parameters: int = 1000) -> Registration:
        """Register a model with the recipe ``model`` that gets the first ``errors`` test images wrong."""
        correct = np.arange(len(self.test)) >= errors
        rows = [{"actual": "a", "predicted": "a" if each else "b"} for each in correct]
        run_id = mlflow.start_run().info.run_id  # each with predictions of its own
        mlflow.end_run()
        files.write_table(Path("kept/predictions.csv"), rows)
        MlflowClient().log_artifact(run_id, "kept/predictions.csv", "evaluation")
        self.model(model)
        logged = mlflow.initialize_logged_model(name="model", source_run_id=run_id).model_id
        MlflowClient().log_model_artifact(logged, "kept/model.safetensors", "extra_files")
        MlflowClient().finalize_logged_model(logged, "READY")
        entry = Entry(
            run_id=run_id,
            model_id=logged,
            model_sha256=self.model(model),
            predictions_sha256=files.sha256(Path("kept/predictions.csv").read_bytes()),
            lineage={"data.name": self.dataset.name},
            recipe={},
            parameters=parameters,
            scores={"ece": 0.01, "error_count": errors},
            correct=correct,
            card="a card",
        )
        return promotion.register(entry, dataset or self.dataset, self.test, NO_RULES)

    def model(self, model: str) -> str:
        """The SHA-256 of such a model's file, which it writes: the network is the same in all."""
        content = model_file.to_bytes(replace(self.saved, recipe={"model": model}))
        files.write(Path("kept/model.safetensors"), content)
        return files.sha256(content)


def artifacts(number: int) -> Path:
    """Where the store keeps the files of a version."""
    model_id = str(version(number).source).removeprefix("models:/")
    return Path(str(MlflowClient().get_logged_model(model_id).artifact_location).removeprefix("file://"))
