"""The model file rebuilds its own network."""

from dataclasses import asdict, dataclass

import pytest
import torch

from pipeline.errors import Fault
from pipeline.model import model_file
from pipeline.model.cnn import CNN, Architecture

ARCHITECTURE = Architecture(
    (16, 20, 3), ("cat", "dog"), (4, 6), kernel_size=5, padding=2, pool="min", dropout=0.25, batch_norm=True
)


def network(seed: int) -> CNN:
    return CNN(ARCHITECTURE, torch.Generator().manual_seed(seed))


def test_the_file_holds_all_that_the_network_is() -> None:
    cnn = network(0)
    saved = model_file.from_bytes(model_file.to_bytes(cnn, {"data.name": "pets"}, {"model.filters": [4, 6]}))
    read = saved.cnn
    assert read.architecture == ARCHITECTURE
    assert (saved.data, saved.recipe) == ({"data.name": "pets"}, {"model.filters": [4, 6]})
    images = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(read(images), cnn.eval()(images), rtol=0, atol=0)


def test_a_new_field_of_the_architecture_may_be_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Wider(Architecture):
        strides: tuple[tuple[int, int], ...] = ()

    monkeypatch.setattr(model_file, "Architecture", Wider)
    architecture = Wider(**asdict(ARCHITECTURE) | {"strides": ((1, 2), (2, 2))})
    content = model_file.to_bytes(CNN(architecture, torch.Generator().manual_seed(0)))
    assert model_file.from_bytes(content).cnn.architecture == architecture


def test_the_same_weights_give_the_same_bytes() -> None:
    assert model_file.to_bytes(network(0)) == model_file.to_bytes(network(0)) != model_file.to_bytes(network(1))


@pytest.mark.parametrize("content", [b"", b"x" * 200, model_file.to_bytes(network(0))[:-5]])
def test_a_damaged_file_is_refused_with_the_remedy(content: bytes) -> None:
    with pytest.raises(Fault, match=r"the model file is damaged .* run `dvc repro -f train`"):
        model_file.from_bytes(content)
