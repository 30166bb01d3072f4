"""The model file rebuilds its own network."""

import json
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pipeline.errors import Fault
from pipeline.model import model_file
from pipeline.model.cnn import CNN, Architecture
from pipeline.model.model_file import TrainedModel
from pipeline.model.novelty import Novelty, feature_count
from pipeline.params import check_model
from tests import forked

ARCHITECTURE = Architecture(
    (16, 20, 3), ("cat", "dog"), (4, 6), kernel_size=5, padding=2, pool="min", dropout=0.25, batch_norm=True
)


NOVELTY = Novelty(torch.eye(3, feature_count(ARCHITECTURE)), (0.25, 0.5), (8.0, 2.0), 3.5)


def network(seed: int) -> CNN:
    return CNN(ARCHITECTURE, torch.Generator().manual_seed(seed))


def to_bytes(cnn: CNN) -> bytes:
    return model_file.to_bytes(TrainedModel(cnn))


def test_the_file_holds_all_that_the_network_is() -> None:
    cnn = network(0)
    trained = TrainedModel(cnn, {"data.name": "pets"}, {"model.filters": [4, 6]}, {"resize": "fit"}, NOVELTY)
    saved = model_file.from_bytes(model_file.to_bytes(trained))
    read = saved.cnn
    assert read.architecture == ARCHITECTURE
    assert replace(saved, cnn=cnn, novelty=None) == replace(trained, cnn=cnn, novelty=None)
    assert saved.novelty is not None
    assert torch.equal(saved.novelty.centres, NOVELTY.centres)
    assert replace(saved.novelty, centres=NOVELTY.centres) == NOVELTY
    images = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(read(images), cnn.eval()(images), rtol=0, atol=0)


def test_a_network_for_colour_pictures_rebuilds_itself() -> None:
    architecture = Architecture(
        (16, 20, 3),
        ("cat", "dog"),
        (4, 6),
        convolutions=2,
        padding="same",
        batch_norm=True,
        residual=True,
        head="average",
        dense=5,
        normalize=True,
        mean=(0.1, 0.25, 1 / 3),
        std=(0.3, 0.0, 0.2),
    )
    cnn = CNN(architecture, torch.Generator().manual_seed(0)).eval()
    read = model_file.from_bytes(to_bytes(cnn), check_model=check_model).cnn
    assert read.architecture == architecture
    images = torch.randint(256, (3, 16, 20, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    torch.testing.assert_close(read(images), cnn(images), rtol=0, atol=0)


def test_a_file_of_an_earlier_release_has_the_layers_of_that_time() -> None:
    facts, data = header_of(to_bytes(network(0)))
    cnn = json.loads(facts["__metadata__"]["cnn"])
    for name in ("convolutions", "residual", "head", "dense", "normalize", "mean", "std"):
        del cnn["architecture"][name]
    del cnn[model_file.DIGEST]
    cnn[model_file.DIGEST] = model_file._digest(cnn, WEIGHTS)
    facts["__metadata__"]["cnn"] = json.dumps(cnn)
    assert model_file.from_bytes(with_header(json.dumps(facts), data)).cnn.architecture == ARCHITECTURE


def test_a_new_field_of_the_architecture_may_be_a_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Wider(Architecture):
        strides: tuple[tuple[int, int], ...] = ()

    monkeypatch.setattr(model_file, "Architecture", Wider)
    architecture = Wider(**asdict(ARCHITECTURE) | {"strides": ((1, 2), (2, 2))})
    content = to_bytes(CNN(architecture, torch.Generator().manual_seed(0)))
    assert model_file.from_bytes(content).cnn.architecture == architecture


def test_the_same_weights_give_the_same_bytes() -> None:
    assert to_bytes(network(0)) == to_bytes(network(0)) != to_bytes(network(1))


@pytest.mark.parametrize("content", [b"", b"x" * 200, to_bytes(network(0))[:-5]])
def test_a_damaged_file_is_refused_with_the_remedy(content: bytes) -> None:
    with pytest.raises(Fault, match=r"the model file is damaged .* run `dvc repro -f train`"):
        model_file.from_bytes(content)


WEIGHTS = {name: each.contiguous() for name, each in network(0).state_dict().items()}
MEMORY = 100_000_000  # bytes that judging a file may take, besides those of the file


STATISTICS = {"distance": [0.25, 0.5], "logit": [8.0, 2.0], "threshold": 3.5}


def made(
    weights: Mapping[str, Tensor] = WEIGHTS,
    data: object = None,
    recipe: object = None,
    more: Mapping[str, object] | None = None,
    **architecture: Any,
) -> bytes:
    """A model file with other facts and weights than its network's, whose own SHA-256 is right."""
    facts: dict[str, Any] = {"architecture": asdict(ARCHITECTURE) | architecture, "data": data or {}}
    facts |= {"recipe": recipe or {}} | dict(more or {})
    facts[model_file.DIGEST] = model_file._digest(facts, weights)
    return safetensors.torch.save(dict(weights), {model_file.METADATA: json.dumps(facts)})


def with_novelty(centres: Tensor = NOVELTY.centres, **changed: Any) -> bytes:
    return made(WEIGHTS | {model_file.CENTRES: centres.contiguous()}, more={"novelty": STATISTICS | changed})


GOOD = with_novelty()


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header, and its data."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def with_header(header: str, data: bytes) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


def of_many_layers(count: int) -> dict[str, Tensor]:
    return {f"blocks.{number}.convolution.bias": torch.zeros(1) for number in range(count)}


def hostile() -> dict[str, bytes]:
    return {
        "filters that take 6 GB": made(filters=[20000, 4000]),
        "a hundred thousand layers": made(filters=[1] * 100_000),
        "a thousand layers": made(of_many_layers(1000), filters=[1] * 1000),
        "filters that are allowed and not there": made(filters=[1024] * 8, kernel_size=15, pool_size=1, padding=7),
        "images of 60,000 x 60,000": made(image_shape=[60_000, 60_000, 3]),
        "images of nothing": made(image_shape=[0, 20, 3]),
        "images without channels": made(image_shape=[16, 20]),
        "sides that are fractions": made(image_shape=[16.0, 20.0, 3.0]),
        "a filter count that is text": made(filters=["4", "6"]),
        "a kernel that is a fraction": made(kernel_size=5.5),
        "dropout 2": made(dropout=2),
        "dropout NaN": made(dropout=float("nan")),
        "another pooling": made(pool="median"),
        "a parameter more": made(dilation=2),
        "another kind of block": made(residual=True),
        "a dense layer of 10 GB": made(dense=10**6),
        "a dense layer that is not there": made(dense=4096),
        "two means for three channels": made(normalize=True, mean=[0.5, 0.5], std=[0.1, 0.1, 0.1]),
        "a mean that is no number": made(normalize=True, mean=[0.5, 0.5, float("nan")], std=[0.1, 0.1, 0.1]),
        "a mean that is text": made(normalize=True, mean=["0.5", "0.5", "0.5"], std=[0.1, 0.1, 0.1]),
        "a hundred thousand means": made(normalize=True, mean=[0.5] * 10**5, std=[0.1] * 10**5),
        "a deviation below nothing": made(normalize=True, mean=[0.5] * 3, std=[0.1, 0.1, -0.1]),
        "numbers for class names": made(class_names=[1, 2]),
        "class names that are alike": made(class_names=["cat", "cat"]),
        "class names that are alike after many": made(class_names=[*map(str, range(80_000)), "79999"]),
        "an empty class name": made(class_names=["cat", " "]),
        "an escape sequence": made(class_names=["cat", "\x1b[31mdog"]),
        "a class name of 10 kB": made(class_names=["cat", "d" * 10_000]),
        "class names for other images": made(class_names=["cat", "dog", "cow"]),
        "data that is not text": made(data={"data.name": ["pets"]}),
        "an escape sequence for the data's name": made(data={"data.name": "\x1b]0;"}),
        "an escape sequence in the recipe": made(recipe={"seed": "\x1b[31mred\nsecond line"}),
        "an escape sequence in how pictures become images": made(more={"preprocessing": {"\x1b[31mx": 1}}),
        "NaN": made(WEIGHTS | {"dense.bias": torch.tensor([0.0, float("nan")])}),
        "infinity": made(WEIGHTS | {"dense.bias": torch.tensor([0.0, -float("inf")])}),
        "half precision": made(
            {name: each.half() if each.is_floating_point() else each for name, each in WEIGHTS.items()}
        ),
        "a tensor less": made({name: each for name, each in WEIGHTS.items() if name != "dense.bias"}),
        "a tensor more": made(WEIGHTS | {"more": torch.zeros(1)}),
        "metadata of 100 MB": with_header(json.dumps({"__metadata__": {"cnn": " " * 100_000_000}}), b""),
        "metadata that is nested deeply": with_header(json.dumps({"__metadata__": {"cnn": "[" * 900_000}}), b""),
        "a header that is nested deeply": with_header("[" * 900_000, b""),
        "a header of objects": with_header(f"[{'{},' * 300_000}1]", b""),
        "a header longer than the file": (2**63).to_bytes(8, "little") + b"{}",
        "no metadata": safetensors.torch.save(WEIGHTS),
        "centres without statistics": made(WEIGHTS | {model_file.CENTRES: NOVELTY.centres}),
        "statistics without centres": made(more={"novelty": STATISTICS}),
        "no centres": with_novelty(NOVELTY.centres[:0]),
        "more centres than the classes can have": with_novelty(NOVELTY.centres.repeat(9, 1)),
        "centres of other features": with_novelty(NOVELTY.centres[:, :-1]),
        "a centre that is not a number": with_novelty(NOVELTY.centres * float("nan")),
        "statistics that are text": with_novelty(threshold="3.5"),
        "statistics that are infinite": with_novelty(threshold=float("inf")),
        "a statistic less": with_novelty(distance=[0.25]),
        "a statistic more": with_novelty(logit=[8.0, 2.0, 1.0]),
        "a deviation of nothing": with_novelty(logit=[8.0, 0.0]),
    }


def _refuse_all(folder: Path) -> None:
    """Each is refused without a network being built with memory of its own."""
    content = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    model_file.from_bytes(content.pop("good"), "it", check_model)  # what the first one loads, and only it
    built: list[str] = []

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            built.append(name)

    with register_module_parameter_registration_hook(count):
        for name, each in content.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(
                Fault, match=r"^it is damaged \(.*\): run `dvc repro -f train`, then `dvc repro`$"
            ) as end:
                model_file.from_bytes(each, "it", check_model)
            assert str(end.value).isprintable(), name
            assert len(str(end.value)) < 400, name
            assert built == [], name
            assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MEMORY, name


@pytest.mark.faults
def test_fault_42_a_hostile_file_is_refused_before_its_network_is_built(tmp_path: Path) -> None:
    for name, content in (hostile() | {"good": GOOD}).items():
        (tmp_path / name).write_bytes(content)
    assert forked.call(_refuse_all, tmp_path, folder=tmp_path, seconds=120) == 0


@pytest.mark.faults
def test_fault_42_the_reason_names_the_parameter_and_its_bounds() -> None:
    reason = r"\(model\.filters\.0 is 20000: input should be less than or equal to 1024\)"
    with pytest.raises(Fault, match=reason):
        model_file.from_bytes(made(filters=[20000, 4000]), check_model=check_model)


DTYPES = st.sampled_from(["F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "x", ""])
NUMBERS = st.integers(-(2**65), 2**65) | st.integers(0, 2000) | st.none() | st.floats()


@st.composite
def other_headers(draw: st.DrawFn) -> bytes:
    """The good file with something else in its header: sizes, offsets, types, tensors that overlap or come twice."""
    header, data = header_of(GOOD)
    name, other = (draw(st.sampled_from(sorted(WEIGHTS))) for _ in range(2))
    match draw(st.sampled_from(["length", "offsets", "overlap", "twice", "dtype", "shape", "metadata", "missing"])):
        case "length":
            return draw(st.integers(0, 2**64 - 1) | st.integers(0, 5000)).to_bytes(8, "little") + GOOD[8:]
        case "offsets":
            header[name]["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
        case "overlap":
            header[name]["data_offsets"] = header[other]["data_offsets"] if other != name else [0, 0]
        case "twice":
            again = json.dumps({name: header[other]})
            return with_header(f"{again[:-1]}, {json.dumps(header)[1:]}", data)
        case "dtype":
            header[name]["dtype"] = draw(DTYPES)
        case "shape":
            header[name]["shape"] = draw(st.lists(NUMBERS, max_size=5))
        case "metadata":
            header["__metadata__"] = draw(st.dictionaries(st.sampled_from(["cnn", "x"]), st.text() | NUMBERS))
        case "missing":
            del header[name]
    return with_header(json.dumps(header), data)


@pytest.mark.faults
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(content=other_headers())
def test_fault_42_any_other_header_is_refused(content: bytes) -> None:
    try:
        read = model_file.from_bytes(content, "it", check_model)
    except Fault as error:
        assert str(error).isprintable()
    else:  # the same file, or the same header with more or less space in it
        assert read.cnn.architecture == ARCHITECTURE
        assert all(torch.equal(each, WEIGHTS[name]) for name, each in read.cnn.state_dict().items())
