"""What is registered of a model, and how it is found and loaded; on a real MLflow registry."""

import asyncio
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from starlette.requests import Request

from pipeline import evaluate, files, visualize
from pipeline.data.decoder import Decoder
from pipeline.data.splits import TEST, LabelledImages, read_dataset, read_split
from pipeline.errors import Fault, UserError
from pipeline.model import model_file
from pipeline.model.metrics import wilson_interval
from pipeline.tracking import registry, serving
from tests.conftest import change_dataset_json, run_command
from tests.tracking.registering import NAME, Candidates, artifacts, version


@pytest.fixture
def candidates(finished_copy: Path) -> Candidates:
    return Candidates()


def test_the_evaluated_model_is_registered_with_its_lineage_and_scores(finished: Path) -> None:
    champion = MlflowClient().get_model_version_by_alias(NAME, "champion")
    dataset = read_dataset()
    (run,) = mlflow.search_runs(output_format="list")
    assert str(champion.version) == "1"
    assert champion.run_id == run.info.run_id
    assert champion.tags["model.sha256"] == files.sha256(files.MODEL.read_bytes())
    assert champion.tags["test.sha256"] == dataset.splits[TEST].sha256
    assert champion.tags["predictions.sha256"] == files.sha256(files.PREDICTIONS.read_bytes())
    assert json.loads(champion.tags["class.names"]) == list("0123456789")
    assert json.loads(champion.tags["recipe"]) == model_file.from_bytes(files.MODEL.read_bytes()).recipe
    assert champion.tags["gate.decision"] == "champion"
    for key, value in run.data.tags.items():
        if key.startswith(("mlflow.", "process", "run.")):  # of the run, and nothing of the model
            assert key not in champion.tags
        else:
            assert champion.tags[key] == value
    scores = json.loads(files.METRICS.read_text())["test"]
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "baseline_accuracy", "loss", "ece", "error_count"):
        assert champion.tags[f"test.{key}"] == str(scores[key])


def test_the_card_says_what_metrics_and_data_say(finished: Path) -> None:
    card = str(version(1).description)
    metrics, dataset = json.loads(files.METRICS.read_text()), read_dataset()
    assert f"| accuracy | {metrics['test']['accuracy']:.2%} |" in card
    beside = {"the mean recall of the classes": "balanced_accuracy", "most common class": "baseline_accuracy"}
    for row, score in beside.items():
        assert f"{row} | {metrics['test'][score]:.2%} |" in card
    assert f"| macro F1 | {metrics['test']['macro_f1']:.4f} |" in card
    assert f"| expected calibration error | {metrics['test']['ece']:.4f} |" in card
    for change, accuracy in metrics["test"]["robustness"].items():
        assert f"| accuracy, {change.replace('_', ' ')} | {accuracy:.2%} |" in card
    for name, score in metrics["test"]["per_class"].items():
        assert f"| {name} | {dataset.splits[TEST].per_class[name]:,} | {score['recall']:.2%} |" in card
    assert f"SHA-256 `{dataset.sha256}`" in card
    assert "conv2d_1          (11, 11, 64)            18,496" in card
    assert "| model.dropout | 0.5 |" in card
    count = dataset.splits[TEST].count
    low, high = wilson_interval(count - metrics["test"]["error_count"], count)
    assert f"| {low:.2%} ... {high:.2%} |" in card
    for split, facts in dataset.splits.items():
        assert f"| {split} | {facts.count:,} |" in card
        assert facts.sha256[:16] in card
    assert "It knows only these classes" in card
    commit = version(1).tags.get("git.commit")
    assert f"`git checkout {commit}`" in card if commit else "git was not available" in card
    assert Path("reports/model_card.md").read_text() == card
    assert len(card) < 5000  # what the databases of MLflow take


@pytest.mark.faults
def test_fault_28_the_card_of_a_stand_in_says_so_and_names_are_shown_as_they_are(finished_copy: Path) -> None:
    change_dataset_json(requested="mnist", source="<script>alert(1)</script> | *bold*")
    evaluate.main()
    card = str(version(1).description)
    assert "**mnist-5k stood in for mnist**, which was not available." in card
    assert "&lt;script&gt;alert\\(1\\)&lt;/script&gt; \\| \\*bold\\*" in card


def test_a_version_is_found_by_alias_and_number(candidates: Candidates) -> None:
    candidates.register("1", 50)
    candidates.register("2", 60)
    for reference in ("challenger", "2", f"{NAME}@challenger", f"{NAME}/2"):
        assert str(registry.find(reference).version) == "2"
    with pytest.raises(UserError, match=f"{NAME} has no version 7; it has: 1, 2, challenger, champion"):
        registry.find("7")
    with pytest.raises(UserError, match=f"no model other is registered here; registered: {NAME}"):
        registry.find("other@champion")
    shutil.rmtree("data")
    assert str(registry.find("champion").version) == "1"  # the only model there is


def test_a_model_comes_back_and_answers_as_before(finished: Path) -> None:
    loaded = registry.load(version(1))
    test: LabelledImages = read_split(read_dataset(), TEST)
    probabilities = loaded.classify(test.images.numpy()).probabilities
    assert loaded.class_names == tuple("0123456789")
    assert loaded.image_shape == (28, 28, 1)
    rows = files.read_table(files.PREDICTIONS, made_by="evaluate")
    assert [str(label) for label in probabilities.argmax(axis=1)] == [row["predicted"] for row in rows]
    alone = np.concatenate([loaded.classify(test.images[[index]].numpy()).probabilities for index in range(20)])
    np.testing.assert_allclose(alone, probabilities[:20], atol=1e-5)


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("open('PWNED', 'w')",)


def _pickled_graph(path: Path) -> None:
    path.write_bytes(pickle.dumps(Attack()))


def _graph_whose_shapes_are_code(path: Path) -> None:
    """torch.export.load evaluates the expressions of shapes: what is in this one would be run."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (described,) = (name for name in records if name.endswith("models/model.json"))
    attack = b"__import__('pathlib').Path('PWNED').touch()"
    records[described], count = re.subn(rb'("expr_str": ?)"[^"]+"', rb'\1"' + attack + b'"', records[described])
    assert count > 0
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("change", [_pickled_graph, _graph_whose_shapes_are_code])
def test_fault_26_a_graph_that_carries_code_is_never_read(
    finished_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    evaluate.main()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # whatever somebody has set
    change(artifacts(1) / "data/model.pt2")
    test = read_split(read_dataset(), TEST)[:5]
    for command, *arguments in (["export", "--format", "pt2"], ["predict", "--json", "picture.png"]):
        Image.fromarray(test.images[0, ..., 0].numpy()).save("picture.png")
        done = run_command(command, *arguments, folder=finished_copy)
        assert done.returncode == 0, done.stderr
    serving.application(version(1), "127.0.0.1")
    assert not list(finished_copy.rglob("PWNED"))


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("way", ["pickle", "another model", "a changed weight", "none"])
def test_fault_26_a_model_file_that_is_not_the_registered_one_is_refused(finished_copy: Path, way: str) -> None:
    evaluate.main()
    path = artifacts(1) / "extra_files/model.safetensors"
    content = path.read_bytes()
    match way:
        case "pickle":
            path.write_bytes(pickle.dumps(Attack()))
        case "another model":
            path.write_bytes(model_file.to_bytes(model_file.TrainedModel(model_file.from_bytes(content).cnn)))
        case "a changed weight":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "none":
            path.unlink()
    reason = "cannot be read" if way == "none" else r"is not the one that was registered \(another SHA-256\)"
    for use in (registry.load, partial(serving.application, host="127.0.0.1")):
        with pytest.raises(Fault, match=reason):
            use(version(1))
    done = run_command("predict", "x.png", folder=finished_copy)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert not list(finished_copy.rglob("PWNED"))


def other_model(change: str) -> bytes:
    """A model file like the trained one, with another architecture or other weights, and a SHA-256 of its own."""
    trained = model_file.from_bytes(files.MODEL.read_bytes())
    cnn = trained.cnn
    if change == "filters":
        cnn.architecture = replace(cnn.architecture, filters=(20_000, 4_000))
    else:
        with torch.no_grad():
            cnn.dense.weight.fill_(3e38)
    return model_file.to_bytes(replace(trained, cnn=cnn))


def replace_model(content: bytes) -> None:
    """Another model here and in the registry, in place of the first one, with its hash."""
    path = artifacts(1) / "extra_files/model.safetensors"
    for each in (path, files.MODEL):
        each.write_bytes(content)
    MlflowClient().set_model_version_tag(version(1).name, "1", "model.sha256", files.sha256(content))


@pytest.mark.faults
@pytest.mark.slow
def test_fault_42_every_reader_refuses_a_hostile_model_file(finished_copy: Path) -> None:
    evaluate.main()
    replace_model(other_model("filters"))
    reason = r"is damaged \(model\.filters\.0 is 20000: input should be less than or equal to 1024\)"
    for use in (registry.load, partial(serving.application, host="127.0.0.1")):
        with pytest.raises(Fault, match=reason):
            use(version(1))
    for stage in (evaluate.main, visualize.main):
        with pytest.raises(Fault, match=reason):
            stage()
    for command, *arguments in (["predict", "x.png"], ["export", "--format", "pt2"]):
        done = run_command(command, *arguments, folder=finished_copy)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        assert re.search(reason, done.stderr.decode())


@pytest.mark.faults
def test_fault_43_a_model_whose_answer_is_not_a_number_is_refused(finished_copy: Path) -> None:
    evaluate.main()
    replace_model(other_model("weights"))
    images = read_split(read_dataset(), TEST).images[:2].numpy()
    with pytest.raises(Fault, match="the model's answer is not a number"):
        evaluate.main()
    loaded = registry.load(version(1))
    with pytest.raises(Fault, match="the model's answer is not a number"):
        loaded.classify(images)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": json.dumps({"inputs": images.tolist()}).encode()}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with Decoder() as decoder:
        answer = asyncio.run(serving.Predictor(loaded, decoder).answer(Request(scope, receive)))
    assert answer.status_code == 500
    assert json.loads(bytes(answer.body))["error"].startswith("the model's answer is not a number")

    Image.fromarray(images[0, ..., 0]).save("x.png")
    for command, *arguments in (["predict", "x.png"], ["export", "--format", "pt2"], ["export", "--format", "onnx"]):
        done = run_command(command, *arguments, folder=finished_copy)
        assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
        begun = f"writing mnist-5k-cnn version 1 as {arguments[-1]}\n" if command == "export" else ""
        assert done.stdout.decode() == begun
        assert done.stderr.startswith(b"error: the model's answer is not a number")
    assert not [*finished_copy.glob("*.pt2"), *finished_copy.glob("*.onnx")]


def test_a_card_that_is_too_long_for_the_store_is_complete_among_the_artifacts(
    candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry._description("short") == "short"
    long = "\n".join(["a line of a card"] * 1000)
    described = registry._description(long)
    assert 4900 < len(described) <= 5000
    assert described.endswith("a line of a card\n\nThe rest is in `evaluation/model_card.md` of the run.")
