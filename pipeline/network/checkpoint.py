"""The trained CNN as bytes, and back."""

import json
from dataclasses import asdict

import safetensors
import safetensors.torch
import torch

from pipeline.errors import Fault
from pipeline.network.cnn import CNN, Architecture

ARCHITECTURE = "architecture"


def to_bytes(cnn: CNN) -> bytes:
    """The weights as safetensors, with the architecture in the metadata: the file rebuilds its own network.

    The same weights give the same bytes, which is why all the metadata is one key: safetensors writes several keys
    in no fixed order.
    """
    weights = {name: tensor.contiguous() for name, tensor in cnn.cpu().state_dict().items()}
    return safetensors.torch.save(weights, {ARCHITECTURE: json.dumps(asdict(cnn.architecture))})


def from_bytes(content: bytes) -> CNN:
    """The CNN that ``to_bytes`` wrote, ready to predict. Raises Fault for bytes that are no such file."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        stored = json.loads(header["__metadata__"][ARCHITECTURE])
        cnn = CNN(
            Architecture(**stored | {key: tuple(stored[key]) for key in ("image_shape", "class_names", "filters")}),
            torch.Generator(),
        )
        cnn.load_state_dict(safetensors.torch.load(content))
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise Fault(f"the model file is damaged ({error}): run `dvc repro -f train`") from error
    return cnn.eval()
