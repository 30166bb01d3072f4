"""The model as MLflow stores it: an exported PyTorch graph (`pt2`) together with the model file.

Others load the graph. This project reads the model file, which holds only weights and metadata: a graph is a program,
and loading a modified one could run code.
"""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from pipeline import files
from pipeline.data.splits import Dataset
from pipeline.errors import Fault
from pipeline.model import model_file
from pipeline.model.cnn import CNN, Architecture, Classifier
from pipeline.model.model_file import TrainedModel
from pipeline.params import check_model
from pipeline.private_folders import temporary_folder
from pipeline.tracking.faults import one_line
from pipeline.tracking.lineage import DATA_SHA256
from pipeline.tracking.runs import MODEL_SHA256
from pipeline.tracking.store import equals, store_faults

ROOM = 1_000_000  # bytes that a logged model takes at most, without its weights
MODEL_FILE = f"extra_files/{files.MODEL.name}"  # in a logged model, where MLflow puts it


@store_faults()
def log_model(run_id: str, cnn: CNN, dataset: Dataset, model_sha256: str) -> str:
    """Log the model of a run that has ended, with its file, unless the run already has it complete.

    Returns the model's id; the run's status stays. The model takes images (N, H, W, C) uint8 and gives class
    probabilities (N, classes).
    """
    client = MlflowClient()
    found = client.search_logged_models(
        experiment_ids=[client.get_run(run_id).info.experiment_id], filter_string=equals("source_run_id", run_id)
    )
    for model in found:
        if model.status == LoggedModelStatus.READY and is_complete(str(model.artifact_location), model_sha256):
            return str(model.model_id)
    # torch.export ends the process on a full disk, and mlflow has it write into the temporary folder.
    files.check_room(temporary_folder(), ROOM + 3 * files.MODEL.stat().st_size)
    logged = Model.log(
        artifact_path=None,
        flavor=mlflow.pytorch,
        run_id=run_id,
        name="model",
        pytorch_model=Classifier(cnn),
        serialization_format="pt2",
        signature=_signature(cnn.architecture),
        input_example=_example(cnn.architecture),
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "torch")],
        extra_files=[files.MODEL.resolve().as_uri()],  # mlflow decodes a path as if it were an address
        tags={MODEL_SHA256: model_sha256, DATA_SHA256: dataset.sha256},
    )
    return str(logged.model_id)


def _signature(architecture: Architecture) -> ModelSignature:
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *architecture.image_shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(architecture.class_names)))]),
    )


def _example(architecture: Architecture) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.zeros((2, *architecture.image_shape), dtype=np.uint8)  # two rows leave the batch size free


def read(artifact_uri: str, model_sha256: str) -> TrainedModel:
    """The content of a logged model's model file. Reading it cannot run code.

    Raises Fault if the file cannot be read, or does not have this hash.
    """
    content = _content(artifact_uri, model_sha256)
    return model_file.from_bytes(content, f"the model file of {artifact_uri}", check_model)


def is_complete(artifact_uri: str, model_sha256: str) -> bool:
    """Whether the model file of a logged model can be read, and has this hash."""
    try:
        _content(artifact_uri, model_sha256)
    except Fault:
        return False
    return True


def _content(artifact_uri: str, model_sha256: str) -> bytes:
    with TemporaryDirectory(prefix="convtrack-") as folder:
        try:
            path = mlflow.artifacts.download_artifacts(artifact_uri=f"{artifact_uri}/{MODEL_FILE}", dst_path=folder)
            content = Path(path).read_bytes()
        except (MlflowException, OSError) as error:
            raise Fault(f"the files of {artifact_uri} cannot be read: {one_line(error)}") from error
    if files.sha256(content) != model_sha256:
        raise Fault(f"the model file of {artifact_uri} is not the one that was registered (another SHA-256)")
    return content
