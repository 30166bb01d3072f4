"""A network as a file that others read: the same answers from PyTorch's program and from ONNX."""

import io

import numpy as np
import onnxruntime
import pytest
import torch

from pipeline.model import formats
from pipeline.model.cnn import CNN, Architecture

NETWORKS = {
    "residual": Architecture(
        (20, 24, 3), tuple("abc"), (6, 8), padding="same", convolutions=2, residual=True, batch_norm=True, stride=2
    ),
    "average, dense, normalised": Architecture(
        (20, 24, 3), tuple("abc"), (6, 3), head="average", dense=9, normalize=True, mean=(0.5,) * 3, std=(0.2,) * 3
    ),
}


def untrained(architecture: Architecture) -> CNN:
    """With batch statistics that are not those of the start."""
    cnn = CNN(architecture, torch.Generator().manual_seed(0))
    images = torch.randint(256, (40, *architecture.image_shape), generator=torch.Generator().manual_seed(1))
    cnn.train()(images.to(torch.uint8), torch.Generator().manual_seed(2))
    return cnn.eval()


@pytest.mark.parametrize("kind", NETWORKS)
def test_both_formats_answer_as_the_network_does(kind: str) -> None:
    cnn = untrained(NETWORKS[kind])
    images = torch.randint(256, (7, 20, 24, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    with torch.no_grad():
        expected = cnn(images).softmax(dim=1)
    program = torch.export.load(io.BytesIO(formats.as_pt2(cnn))).module()
    torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-4)
    session = onnxruntime.InferenceSession(formats.as_onnx(cnn))
    for count in (1, 7):
        (probabilities,) = session.run(["probabilities"], {"images": images[:count].numpy()})
        np.testing.assert_allclose(probabilities, expected[:count], atol=1e-4)
    assert expected.std(dim=0).max() > 1e-3  # it does not say the same of all images
