"""Export formats: the CNN as a file that needs neither this project nor MLflow."""

import io
import json

import torch
from torch.export import Dim, ExportedProgram

from pipeline.model import metrics
from pipeline.model.cnn import CNN, MAX_IMAGES, Classifier

CLASS_NAMES = "class_names"  # the key of the names in both formats, as a JSON list


def _program(cnn: CNN) -> ExportedProgram:
    _check_answers(cnn)
    example = torch.zeros((2, *cnn.architecture.image_shape), dtype=torch.uint8)
    images = {0: Dim("N", min=1, max=MAX_IMAGES)}
    return torch.export.export(Classifier(cnn), (example,), dynamic_shapes={"images": images})


def _check_answers(cnn: CNN) -> None:
    """Raises Fault where the answer to a black, a white or a noisy image is not a number: no reader would notice it."""
    shape = cnn.architecture.image_shape
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = [torch.full(shape, value, dtype=torch.uint8) for value in (0, 255)]
    metrics.finite(metrics.predict_logits(cnn, torch.stack([*plain, noise])))


def as_pt2(cnn: CNN) -> bytes:
    """A PyTorch program for torch.export.load, with the class names in its ``extra_files``.

    Raises Fault for a network whose answers are not numbers.
    """
    content = io.BytesIO()
    names = json.dumps(cnn.architecture.class_names)
    torch.export.save(_program(cnn), content, extra_files={f"{CLASS_NAMES}.json": names})
    return content.getvalue()


def as_onnx(cnn: CNN) -> bytes:
    """ONNX: input ``images`` (N, H, W, C) uint8, output ``probabilities`` (N, classes), the names in its metadata.

    Raises ImportError where the extra ``onnx`` is not installed, and Fault for a network whose answers are not numbers.
    """
    exported = torch.onnx.export(
        _program(cnn),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: "N"}},
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = CLASS_NAMES, json.dumps(cnn.architecture.class_names)
    return bytes(model.SerializeToString())
