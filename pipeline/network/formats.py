"""An exported graph as a file that needs neither this project nor MLflow."""

import io
import json
from collections.abc import Sequence

import torch

CLASS_NAMES = "class_names"  # under which both formats hold them, as a JSON list


def as_pt2(program: torch.export.ExportedProgram, class_names: Sequence[str]) -> bytes:
    """For torch.export.load, which gives the class names back in ``extra_files``."""
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={f"{CLASS_NAMES}.json": json.dumps(class_names)})
    return content.getvalue()


def as_onnx(program: torch.export.ExportedProgram, class_names: Sequence[str]) -> bytes:
    """ONNX: input ``images`` (N, H, W, C) uint8, output ``probabilities`` (N, classes), the names in its metadata.

    Raises ImportError where the extra ``onnx`` is not installed.
    """
    exported = torch.onnx.export(
        program,
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
    entry.key, entry.value = CLASS_NAMES, json.dumps(class_names)
    return bytes(model.SerializeToString())
