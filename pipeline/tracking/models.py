"""The model as MLflow keeps it: an exported PyTorch graph (`pt2`), logged, and read again without running its code."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray

from pipeline.errors import Fault
from pipeline.images.splits import Dataset
from pipeline.network.cnn import CNN, Classifier
from pipeline.tracking.runs import MODEL_SHA256, store_faults

GRAPH = "data/model.pt2"
PIECE = 250  # images at a time


@store_faults()
def log_model(run_id: str, cnn: CNN, dataset: Dataset, model_sha256: str) -> str:
    """The model of a run that has ended, if it does not have it yet; its status stays. Returns the model's id.

    The model takes images (N, H, W, C) uint8 and gives class probabilities (N, classes). It is logged when it is
    evaluated, since exporting it is no part of the training.
    """
    found = MlflowClient().search_logged_models(
        experiment_ids=[MlflowClient().get_run(run_id).info.experiment_id],
        filter_string=f"source_run_id = '{run_id}'",
    )
    for model in found:
        if model.status == LoggedModelStatus.READY:
            return str(model.model_id)
    a = cnn.architecture
    logged = Model.log(
        artifact_path=None,
        flavor=mlflow.pytorch,
        run_id=run_id,
        name="model",
        pytorch_model=Classifier(cnn),
        serialization_format="pt2",
        signature=ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *a.image_shape))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(a.class_names)))]),
        ),
        input_example=np.zeros((2, *a.image_shape), dtype=np.uint8),  # two rows leave the batch size free
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "torch")],
        tags={MODEL_SHA256: model_sha256, "data.sha256": dataset.sha256},
    )
    return str(logged.model_id)


@dataclass(frozen=True)
class Exported:
    """A logged model in memory.

    ``program`` takes images (N, H, W, C) uint8 and gives class probabilities (N, classes) float32, up to its limit of
    images at a time; ``classify`` does the same for any number of images in numpy.
    """

    program: torch.export.ExportedProgram
    image_shape: tuple[int, int, int]

    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (N, classes) of images (N, H, W, C)."""
        graph = self.program.module()
        with torch.no_grad():
            pieces = [graph(piece) for piece in torch.split(torch.from_numpy(images), PIECE)]
        probabilities: NDArray[np.float32] = torch.cat(pieces).numpy()
        return probabilities


def read(folder: Path, name: str) -> Exported:
    """The model in a folder as MLflow saves it; ``name`` is for messages.

    It may come from anybody, so nothing is unpickled, and no code that lies beside it becomes importable: a Fault for a
    model that would need either.
    """
    try:
        described = Model.load(str(folder))
        if not _is_graph_alone(folder, described.flavors):
            raise Fault(f"{name} is no exported graph alone, and nothing else is loaded")
        with no_pickle():
            mlflow.pytorch.load_model(str(folder))  # refuses a graph with anything pickled in it
        program = torch.export.load(folder / GRAPH)
        (inputs,) = described.signature.inputs.inputs
        height, width, channels = inputs.shape[1:]
    except (MlflowException, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise Fault(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return Exported(program, (height, width, channels))


def _is_graph_alone(folder: Path, flavors: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether it is read by MLflow's own code alone, with nothing beside the graph that somebody could have added."""
    torch_flavor, general = flavors.get("pytorch", {}), flavors.get("python_function", {})
    files = [path.relative_to(folder).as_posix() for path in (folder / "data").rglob("*") if path.is_file()]
    return (
        set(flavors) == {"pytorch", "python_function"}
        and (torch_flavor.get("model_data"), general.get("data")) == ("data", "data")
        and general.get("loader_module") == "mlflow.pytorch"
        and not (torch_flavor.get("code") or general.get("code"))
        and files == [GRAPH]
    )


@contextmanager
def no_pickle() -> Iterator[None]:
    """Have mlflow refuse what it would have to unpickle, whatever is set outside."""
    name = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
