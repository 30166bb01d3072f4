"""A registered model as a file: the same answers without MLflow."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from pipeline.data.splits import TEST, read_dataset, read_split
from pipeline.errors import Fault
from pipeline.export import WRITERS
from pipeline.model.cnn import CNN
from pipeline.tracking import registry
from tests.conftest import run_command


def test_onnx_gives_the_same_probabilities(finished: Path, tmp_path: Path) -> None:
    done = run_command("export", "--format", "onnx", "--out", str(tmp_path / "it.onnx"), folder=finished)
    assert done.returncode == 0, done.stderr
    assert f"mnist-5k-cnn version 1 -> {tmp_path}/it.onnx, ".encode() in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list("0123456789")
    images = read_split(read_dataset(), TEST).images.numpy()
    expected = registry.load(registry.find("champion")).classify(images).probabilities
    for count in (1, 1000):
        (probabilities,) = session.run(["probabilities"], {"images": images[:count]})
        np.testing.assert_allclose(probabilities, expected[:count], atol=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("answered", ["black", "white"])
def test_fault_43_a_network_whose_answers_overflow_is_not_exported(
    learned: CNN, write: Callable[[CNN], bytes], answered: str
) -> None:
    with torch.no_grad():
        learned.dense.weight.fill_(3e38)
        for name, weight in learned.named_parameters():
            if name.endswith("convolution.bias"):  # what a black image has of the features
                weight.fill_(1 if answered == "black" else 0)
    assert all(weight.isfinite().all() for weight in learned.state_dict().values())
    with pytest.raises(Fault, match="the model's answer is not a number"):
        write(learned)


@pytest.mark.slow
def test_pt2_gives_the_same_probabilities_to_torch_alone(finished: Path, tmp_path: Path) -> None:
    done = run_command("export", "--format", "pt2", "--out", str(tmp_path / "made/it.pt2"), folder=finished)
    assert done.returncode == 0, done.stderr
    images = read_split(read_dataset(), TEST).images[:300].numpy()
    np.save(tmp_path / "images.npy", images)
    code = """
import json, sys, numpy as np, torch
names = {"class_names.json": ""}
graph = torch.export.load("made/it.pt2", extra_files=names).module()
assert json.loads(names["class_names.json"]) == list("0123456789")
with torch.no_grad():
    np.save("probabilities.npy", graph(torch.from_numpy(np.load("images.npy"))).numpy())
assert not {"mlflow", "pipeline"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    expected = registry.load(registry.find("champion")).classify(images).probabilities
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), expected, atol=1e-6)
