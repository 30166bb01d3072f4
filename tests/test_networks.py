"""docs/networks.md: its example gives the layers that it shows, goes through all stages, and learns colours."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline import evaluate, files, prepare, recipe, train, visualize
from pipeline.data.image_files import Preprocessing
from pipeline.data.splits import Dataset, LabelledImages, read_dataset
from pipeline.explain import report
from pipeline.model import model_file
from pipeline.model.cnn import multiply_adds, summary
from pipeline.params import Model, Params, parse_yaml
from tests.conftest import REPOSITORY, write_params
from tests.data.test_sources import publish_small_cifar10

PATH = REPOSITORY / "docs/networks.md"
PAGE = PATH.read_text()


def fenced(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(block)


def example() -> Params:
    """The parameters of the page."""
    return Params.model_validate(parse_yaml(fenced("yaml").encode(), PATH))


def colour_pictures(side: int = 32) -> Dataset:
    preprocessing, names = Preprocessing("fit", (side, side, 3)), tuple("0123456789")
    return Dataset("cifar10", "cifar10", "a test", names, preprocessing, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), {})


def test_the_example_has_the_layers_that_the_page_shows() -> None:
    architecture = recipe.architecture(example(), colour_pictures())
    assert summary(architecture) + "\n" == fenced("text")
    assert (architecture.mean, architecture.std) == ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    default = recipe.architecture(Params(), colour_pictures())
    millions, of_default = (f"{multiply_adds(each) / 1e6:.0f} million" for each in (architecture, default))
    assert f"{millions} multiply-adds for each picture, and the default network {of_default}" in " ".join(PAGE.split())


def test_the_table_has_every_parameter_that_makes_another_network() -> None:
    named = set(re.findall(r"^\| `(\w+)", PAGE, re.MULTILINE))
    defaults = {"kernel_size", "stride", "pool", "pool_size", "dropout"}
    assert named == set(Model.model_fields) - defaults


def tinted(digits: LabelledImages, generator: torch.Generator) -> LabelledImages:
    """Digits of any colour on a ground of any other, (N, 28, 28, 3): neither is always the brighter one."""
    grounds, inks = torch.randint(256, (2, len(digits), 1, 1, 3), generator=generator)
    share = digits.images / 255
    return LabelledImages((grounds * (1 - share) + inks * share).round().to(torch.uint8), digits.labels)


@pytest.mark.slow
def test_its_layers_learn_what_as_many_convolutions_alone_do_not(digits: dict[str, LabelledImages]) -> None:
    torch.set_num_threads(1)  # others may use the cores: batch normalisation would wait for its threads at each step
    generator = torch.Generator().manual_seed(0)
    some, test = (tinted(digits[name], generator) for name in ("train", "test"))
    fast = {"train.batch_size": 32, "train.epochs": 3, "train.schedule": "one-cycle", "train.learning_rate": 0.01}
    accuracies = []
    for changed in ({}, {"model.batch_norm": False, "model.residual": False}):
        params = example().changed({"model.filters.width": 8} | fast | changed)
        cnn = recipe.build(params, colour_pictures(28))
        *_, last = recipe.fit(cnn, some, test, params)
        accuracies.append(last.validation_accuracy)
    assert accuracies[0] > 0.5
    assert accuracies[1] < 0.3


@pytest.mark.slow
def test_the_example_goes_through_all_stages(
    workspace: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish_small_cifar10(monkeypatch, tmp_path_factory.mktemp("published"), count=15)
    quick = {"train.epochs": 1, "visualize.maximisation.steps": 3, "visualize.occlusion_side": 16}
    model = example().model.model_dump(mode="json")
    write_params(workspace, quick | {"data.dataset": "cifar10", "model": model})
    for stage in (prepare, train, evaluate, visualize):
        stage.main()
    assert fenced("text") in capsys.readouterr().out
    assert fenced("text") in files.CARD.read_text()
    read = model_file.from_bytes(files.MODEL.read_bytes()).cnn.architecture
    assert (read.mean, read.std) == (read_dataset().mean, read_dataset().std)
    for figure in report.FIGURES:
        with Image.open(files.FIGURES / f"{figure}.png") as picture:
            assert picture.width > 800
