"""The network is written once: a change of `Block` in one place reaches everything that computes with it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Runs beside a copy of pipeline/ whose blocks have another activation; the arguments are the prepared splits, a model
# file, and the picture to predict. What the network should give is computed here, by hand, in float64.
CHECKS = """
import io, sys
from pathlib import Path
import torch
from torch.nn import functional as F
from pipeline.data.splits import read_dataset, read_split
from pipeline.explain.attribution import feature_maps
from pipeline.model import formats, metrics, model_file, training

prepared, model = map(Path, sys.argv[1:3])
dataset = read_dataset(prepared)
train, validation, test = (read_split(dataset, split, prepared) for split in ("train", "validation", "test"))
cnn = model_file.from_bytes(model.read_bytes()).cnn
images, labels = test.images[:200], test.labels[:200]

weights = {name: values.double() for name, values in cnn.state_dict().items()}
maps, by_hand = images.permute(0, 3, 1, 2).double() / 255, []
for block in ("blocks.0", "blocks.1"):
    maps = F.gelu(F.conv2d(maps, weights[f"{block}.convolution.weight"], weights[f"{block}.convolution.bias"]))
    by_hand.append(maps)
    maps = F.max_pool2d(maps, 2)
logits = F.linear(maps.permute(0, 2, 3, 1).flatten(1), weights["dense.weight"], weights["dense.bias"])

def check(what, found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}")

check("evaluation", metrics.predict_logits(cnn, images), logits)
check("feature maps", feature_maps(cnn, images)[2].maps, by_hand[1])
exported = torch.export.load(io.BytesIO(formats.as_pt2(cnn))).module()
check("the exported graph", exported(images), logits.softmax(dim=1))
settings = training.Settings(1, 200, "sgd", 1e-9, "constant", 0.0, "cross-entropy", 0.0, "float32")
cnn.dropout.dropped = 0
some = (images, labels)
(epoch,) = training.fit(cnn, some, some, settings, generator=torch.Generator().manual_seed(0))
assert abs(epoch.train_loss - F.cross_entropy(logits, labels).item()) < 1e-4, "training"
"""


def test_an_activation_that_is_replaced_in_one_place_changes_training_scores_maps_and_exports(
    good: Path, tmp_path: Path
) -> None:
    shutil.copytree(REPOSITORY / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    cnn = tmp_path / "pipeline/model/cnn.py"
    assert cnn.read_text().count("= nn.ReLU()") == 1
    cnn.write_text(cnn.read_text().replace("= nn.ReLU()", "= nn.GELU()"))
    arguments = [good / "data/prepared", good / "models/model.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", CHECKS, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_predictions_of_a_registered_model_change_with_it(good: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "tests.drawn", str(tmp_path / "drawn")], cwd=REPOSITORY, check=True)
    answers = []
    for activation in ("ReLU", "GELU"):
        cnn = tmp_path / "pipeline/model/cnn.py"
        cnn.write_text(cnn.read_text().replace("= nn.ReLU()", f"= nn.{activation}()"))
        answers.append(
            subprocess.run(
                [sys.executable, "-m", "pipeline.predict", str(tmp_path / "drawn"), "--json"],
                cwd=tmp_path,
                env={"PATH": "", "DVC_ROOT": str(good), "PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert answers[0].count("\n") == answers[1].count("\n") == 220
    assert answers[0] != answers[1]
