"""The four stages as their users meet them: what they write, and how they say no."""

import csv
import json
import os
import platform
import pty
import re
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import dvc_files, evaluate, files, prepare, results, train, visualize
from pipeline.data import downloads, published, splits
from pipeline.data.image_files import Preprocessing
from pipeline.errors import Fault, UserError, run_command
from pipeline.explain import corruptions, report
from pipeline.model import model_file
from pipeline.model.training import Epoch
from pipeline.tracking import runs
from tests.conftest import (
    QUICK,
    REPOSITORY,
    change_dataset_json,
    change_training_images,
    run_stage,
    write_params,
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that the stages wrote, without MLflow's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for top in ("data", "models", "reports")
        for path in sorted((folder / top).rglob("*"))
        if path.is_file()
    }


def test_the_stages_write_the_promised_files_and_no_others(finished: Path) -> None:
    assert sorted(contents(finished)) == [
        "data/prepared/dataset.json",
        "data/prepared/test.safetensors",
        "data/prepared/train.safetensors",
        "data/prepared/validation.safetensors",
        "models/model.safetensors",
        *(f"reports/contact_sheets/{number:02}-{number}.png" for number in range(10)),
        "reports/data_summary.json",
        *(f"reports/figures/{name}.png" for name in sorted(report.FIGURES)),
        "reports/history.csv",
        "reports/metrics.json",
        "reports/model_card.md",
        *(f"reports/plots/{name}.csv" for name in sorted(report.TABLES)),
        "reports/predictions.csv",
        "reports/promotion.json",
    ]


def test_metrics_and_predictions_agree(finished: Path) -> None:
    metrics = json.loads(files.METRICS.read_text())
    with files.PREDICTIONS.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "actual", "predicted", "confidence"]
    count = splits.read_dataset().splits["test"].count
    assert [row["index"] for row in rows] == [str(index) for index in range(count)]
    errors = [row for row in rows if row["actual"] != row["predicted"]]
    assert metrics["test"]["error_count"] == len(errors)
    assert metrics["test"]["accuracy"] == pytest.approx(1 - len(errors) / count)
    assert 0.88 < metrics["test"]["accuracy"] < 0.97  # two epochs on 3,644 digits
    assert 0 < metrics["test"]["ece"] < 0.2
    sevens = [row for row in rows if row["actual"] == "7"]
    right = [row for row in sevens if row["predicted"] == "7"]
    assert metrics["test"]["per_class"]["7"]["recall"] == pytest.approx(len(right) / len(sevens))
    recalls = [score["recall"] for score in metrics["test"]["per_class"].values()]
    assert metrics["test"]["balanced_accuracy"] == pytest.approx(sum(recalls) / 10)
    assert metrics["test"]["macro_f1"] == pytest.approx(metrics["test"]["balanced_accuracy"], abs=0.02)
    commonest = max(splits.read_dataset().splits[splits.TRAIN].per_class.items(), key=lambda each: each[1])[0]
    assert metrics["test"]["baseline_accuracy"] == sum(row["actual"] == commonest for row in rows) / count
    assert set(metrics["validation"]) == {"accuracy", "loss", "balanced_accuracy", "macro_f1", "baseline_accuracy"}
    assert metrics["parameters"] == 34826
    assert metrics["dataset"] == "mnist-5k"
    history = files.read_table(files.HISTORY, made_by="train")
    assert metrics["validation"]["accuracy"] == pytest.approx(float(history[-1]["validation_accuracy"]))
    assert metrics["validation"]["loss"] == pytest.approx(float(history[-1]["validation_loss"]))


def test_the_model_file_rebuilds_the_network(finished: Path) -> None:
    architecture = model_file.from_bytes(files.MODEL.read_bytes()).cnn.architecture
    assert architecture.filters == (32, 64)
    assert architecture.class_names == tuple("0123456789")
    assert architecture.image_shape == (28, 28, 1)


@pytest.mark.slow
def test_a_second_run_gives_the_same_bytes_with_splits_that_are_read_from_the_disk(
    finished: Path, workspace: Path
) -> None:
    write_params(workspace, QUICK | {"data.memory_limit": 1e-6})
    for stage in (train, evaluate, visualize):
        stage.main()
    assert contents(workspace) == contents(finished)


def test_results_show_the_data_set_and_the_metrics(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.main()
    printed = capsys.readouterr().out
    test = json.loads(files.METRICS.read_text())["test"]
    assert "mnist-5k (3,644 training images)" in printed
    assert f"{test['accuracy']:.2%}" in printed
    balanced, baseline = (f"{test[name]:.2%}" for name in ("balanced_accuracy", "baseline_accuracy"))
    assert f"by class       {balanced} balanced accuracy, macro F1 {test['macro_f1']:.4f}; always " in printed
    assert f"answering the most common class: {baseline}\n" in printed
    assert "make ui" in printed


@pytest.mark.faults
def test_fault_47_results_name_the_command_where_the_store_lacks_what_dvc_has_noted(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `dvc repro -f` in a new store was killed, `dvc repro` has nothing to do."""
    md5s = {path: dvc_files.md5(path.read_bytes()) for path in (files.MODEL, files.PREDICTIONS)}
    outs = [f"{{path: {path}, md5: {md5}}}" for path, md5 in md5s.items()]
    Path("dvc.lock").write_text(f"schema: '2.0'\nstages: {{train: {{outs: [{', '.join(outs)}]}}}}\n")
    with pytest.raises(SystemExit) as end:
        results.main()
    assert end.value.code == results.LACKING
    line = (
        "the store lacks any version of models/model.safetensors, which DVC finds up to date: `dvc repro -f -s evaluate"
    )
    assert f"warning: {line} visualize`\n" in capsys.readouterr().err
    files.MODEL.unlink()
    results.main()  # what is not here, as in a fresh clone, is not missed in the store
    assert capsys.readouterr().err == ""


def test_training_without_a_terminal_prints_the_table_and_a_line_an_epoch(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main()
    printed = capsys.readouterr().out
    assert "conv2d_1          (11, 11, 64)            18,496" in printed
    lines = [line for line in printed.splitlines() if line.startswith("epoch ")]
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("train loss" in line and "validation loss" in line and line.endswith(" s") for line in lines)


def test_training_on_a_terminal_shows_a_bar_with_loss_accuracy_and_the_time_left(workspace: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-m", "pipeline.train"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(workspace)}
    with subprocess.Popen(command, cwd=workspace, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        printed = b""
        with suppress(OSError):  # Linux's way to say that the other end is closed
            while part := os.read(ours, 4096):
                printed += part
    os.close(ours)
    assert process.returncode == 0
    bars = [bar for bar in printed.decode().split("\r") if " images/s" in bar]
    assert any(
        re.search(r"/7.29k \[\d\d:\d\d<\d\d:\d\d, .* images/s, accuracy=\d+%, loss=\d\.\d{3}\]", bar) for bar in bars
    )


def test_training_and_preparing_never_open_the_test_images(workspace: Path) -> None:
    (workspace / "data/prepared/test.safetensors").unlink()
    train.main()
    assert files.MODEL.exists()


@pytest.mark.slow
def test_every_parameter_of_a_stage_is_used(finished_copy: Path) -> None:
    def measured() -> tuple[float, float]:
        with Image.open(files.FIGURES / "confident_mistakes.png") as picture:
            return json.loads(files.METRICS.read_text())["test"]["ece"], picture.height

    error, height = measured()
    maps = (files.FIGURES / "feature_maps.png").read_bytes()
    parameters = {"evaluate.calibration_bins": 100, "visualize.mistakes": 4, "visualize.image": 5}
    write_params(finished_copy, QUICK | parameters)
    evaluate.main()
    visualize.main()
    other_error, other_height = measured()
    assert other_error != error
    assert other_height < height / 3
    assert (files.FIGURES / "feature_maps.png").read_bytes() != maps


def test_results_say_so_where_another_data_set_stands_in(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_dataset_json(requested="mnist")
    results.main()
    assert "mnist-5k, standing in for mnist (3,644 training images)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "content", "line"),
    [
        (
            "data/prepared/dataset.json",
            '{"name": "mn',
            r"data/prepared/dataset\.json is damaged .* run `dvc repro -f prepare`",
        ),
        ("data/prepared/dataset.json", "[]", r"data/prepared/dataset\.json is damaged .* run `dvc repro -f prepare`"),
        ("reports/history.csv", "", r"reports/history\.csv is empty: run `dvc repro -f train`"),
    ],
)
def test_a_damaged_report_names_the_remedy(finished_copy: Path, path: str, content: str, line: str) -> None:
    (finished_copy / path).write_text(content)
    with pytest.raises(Fault, match=line):
        visualize.main()


@pytest.mark.parametrize(
    ("stage", "missing", "line"),
    [
        ("train", "data", "error: data/prepared/dataset.json does not exist: run `dvc repro prepare` first\n"),
        ("evaluate", "models", "error: models/model.safetensors does not exist: run `dvc repro train` first\n"),
        (
            "visualize",
            "reports/history.csv",
            "error: reports/history.csv does not exist: run `dvc repro train` first\n",
        ),
        (
            "visualize",
            "reports/predictions.csv",
            "error: reports/predictions.csv does not exist: run `dvc repro evaluate` first\n",
        ),
        (
            "results",
            "reports/metrics.json",
            "error: reports/metrics.json does not exist: run `dvc repro evaluate` first\n",
        ),
    ],
)
def test_a_stage_before_its_inputs_names_the_stage_to_run(
    finished_copy: Path, stage: str, missing: str, line: str
) -> None:
    target = finished_copy / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    before = contents(finished_copy)
    assert run_stage(stage, finished_copy) == (2, line)
    assert contents(finished_copy) == before


def test_an_invalid_parameter_is_one_line_and_nothing_is_written(workspace: Path) -> None:
    before = contents(workspace)
    write_params(workspace, {"model.dropout": 5})
    for stage in ("prepare", "train"):
        code, line = run_stage(stage, workspace)
        assert (code, line) == (2, "error: params.yaml: model.dropout is 5: input should be less than 1\n")
    assert contents(workspace) == before


def test_layers_that_do_not_fit_the_images_are_reported_before_a_run_is_opened(workspace: Path) -> None:
    write_params(workspace, QUICK | {"model.kernel_size": 15})
    with pytest.raises(UserError, match=r"params\.yaml: model: block 2 does not fit the 7 x 7 pixels"):
        train.main()
    assert not (workspace / "mlruns").exists()


def test_a_missing_gpu_is_reported_before_a_run_is_opened(workspace: Path) -> None:
    write_params(workspace, QUICK | {"train.device": "cuda"})
    code, line = run_stage("train", workspace, CUDA_VISIBLE_DEVICES="")  # none, on any machine
    assert code == 2
    assert line == "error: params.yaml: train.device is cuda, but torch finds no GPU; allowed here: auto | cpu\n"
    assert not (workspace / "mlruns").exists()


def test_a_processor_without_bfloat16_is_reported_before_a_run_is_opened(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(workspace, QUICK | {"train.precision": "bfloat16", "train.device": "cpu"})
    # What an x86 processor with AVX-512 and without these instructions answers; oneDNN alone would take it.
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    with pytest.raises(UserError) as error:
        train.main()
    assert str(error.value) == (
        "params.yaml: train.precision is bfloat16, but this processor has no instructions for it; allowed here: float32"
    )
    assert not (workspace / "mlruns").exists()


@pytest.mark.slow
def test_the_figures_are_the_same_bytes_on_one_thread_and_on_several(finished_copy: Path) -> None:
    drawn = {path: path.read_bytes() for path in files.FIGURES.iterdir()}  # on one thread per core
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)
    for path in drawn:
        path.unlink()
    visualize.main()
    assert set(files.FIGURES.iterdir()) == set(drawn)
    assert [path for path, content in drawn.items() if path.read_bytes() != content] == []


def test_the_image_to_draw_must_exist(finished_copy: Path) -> None:
    write_params(finished_copy, QUICK | {"visualize.image": 945})
    with pytest.raises(UserError, match=r"visualize\.image is 945; allowed: 0 \.\.\. 944"):
        visualize.main()


def _edit_params(folder: Path) -> None:
    changes = {"data.split_seed": 1, "train.learning_rate": 0.01, "evaluate.calibration_bins": 9}
    write_params(folder, QUICK | changes)


def _edit_code(folder: Path) -> None:
    with (folder / "pipeline/files.py").open("a") as code:
        code.write("# a comment\n")


def _replace_data(folder: Path) -> None:
    path = files.PREPARED / "dataset.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("stage", "change", "line"),
    [
        ("prepare", _edit_code, "pipeline/files.py has changed"),
        ("train", _edit_params, "train.learning_rate was 0.001, here it is 0.01"),
        ("train", _replace_data, "data/prepared/dataset.json has changed"),
        ("evaluate", _edit_params, "evaluate.calibration_bins was 15, here it is 9"),
        pytest.param(
            *("visualize", _edit_params, "evaluate.calibration_bins was 15, here it is 9"), marks=pytest.mark.slow
        ),
    ],
)
def test_fault_44_a_stage_whose_inputs_change_while_it_runs_fails_and_keeps_the_older_outputs(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, stage: str, change: Callable[[Path], None], line: str
) -> None:
    """DVC would note what is there at the end."""
    shutil.copytree(REPOSITORY / "pipeline", finished_copy / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", finished_copy)
    monkeypatch.setattr(dvc_files, "ROOT", finished_copy)
    before = contents(finished_copy)
    module, name = {
        "prepare": (splits, "check"),
        "train": (runs.TrainingRun, "log_epoch"),
        "evaluate": (corruptions, "reported_accuracy"),
        "visualize": (visualize, "_draw"),
    }[stage]
    # Drawing takes long, and what it draws does not matter here.
    whole = getattr(module, name) if stage != "visualize" else lambda inputs: []

    def change_then_go_on(*arguments: Any, **named: Any) -> Any:
        change(finished_copy)
        return whole(*arguments, **named)

    monkeypatch.setattr(module, name, change_then_go_on)
    with pytest.raises(UserError) as error:
        {"prepare": prepare, "train": train, "evaluate": evaluate, "visualize": visualize}[stage].main()
    assert str(error.value) == (
        f"`{stage}` began with other inputs than are here now ({line}): undo that or keep it, then `dvc repro`"
    )
    changed = {"data/prepared/dataset.json"} if change is _replace_data else set[str]()
    after = contents(finished_copy)
    assert {path for path in after if after[path] != before[path]} == changed


@pytest.mark.faults
def test_fault_44_a_training_whose_params_change_goes_on_where_it_was_once_they_are_back(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = runs.TrainingRun.log_epoch

    def change_then_go_on(run: runs.TrainingRun, epoch: Epoch) -> None:
        write_params(workspace, QUICK | {"model.dropout": 0.1})
        whole(run, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(runs.TrainingRun, "log_epoch", change_then_go_on)
        with pytest.raises(UserError, match=r"model\.dropout was 0\.5, here it is 0\.1"):
            train.main()
    assert not files.MODEL.exists()
    write_params(workspace, QUICK)
    train.main()
    assert "resuming an interrupted training after epoch 2 of 2" in capsys.readouterr().out
    assert model_file.from_bytes(files.MODEL.read_bytes()).recipe["model.dropout"] == 0.5


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_edit_params, "train.learning_rate was 0.001, here it is 0.01"),
        (lambda _: change_training_images(), "data/prepared has changed"),
    ],
)
def test_fault_44_a_model_of_other_parameters_or_data_is_not_evaluated(
    finished_copy: Path, change: Callable[[Path], None], line: str
) -> None:
    change(finished_copy)
    with pytest.raises(UserError) as error:
        evaluate.main()
    assert str(error.value) == (
        f"models/model.safetensors is not what params.yaml and the data here give ({line}): "
        "`dvc repro -f train`, then `dvc repro`"
    )


def test_a_damaged_model_is_refused(finished_copy: Path) -> None:
    files.MODEL.write_bytes(b"no model")
    with pytest.raises(Fault, match=r"models/model\.safetensors is damaged .* run `dvc repro -f train`"):
        evaluate.main()


def test_without_a_mirror_and_without_a_fall_back_prepare_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = replace(published.PUBLISHED["mnist"], mirrors=("http://127.0.0.1:9/",))
    monkeypatch.setitem(published.PUBLISHED, "mnist", closed)
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, "http://mary:secret@127.0.0.1:9/my files")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, {"data.offline_fallback": None})
    with pytest.raises(SystemExit) as end:
        run_command(prepare.main)
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "error: train-images-idx3-ubyte.gz could not be downloaded (http://***@127.0.0.1:9/my files/"
    )
    assert "secret" not in line
    assert line.count("\n") == 1
    assert not (tmp_path / "data/prepared").exists()


def test_prepare_twice_gives_the_same_bytes(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(tmp_path, QUICK)
    monkeypatch.chdir(tmp_path)
    prepare.main()
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.slow
def test_colour_images_of_other_sizes_go_all_the_way(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but sources.py knows what the images are: 24 x 20 pixels, three channels, two classes, no mistakes."""
    shutil.rmtree(workspace / "data")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    images = torch.randint(100, (400, 24, 20, 3), dtype=torch.uint8, generator=generator)
    images[labels == 1, :, :, 0] += 100  # the second class is redder
    toys = splits.LabelledImages(images, labels)
    cut = splits.cut(toys[:320], toys[320:], validation_fraction=0.1)
    names = ("pale", "long & <red>, név")
    splits.write_splits(splits.Prepared(cut, "toys", "toys", "a test", names, Preprocessing("fit", (24, 20, 3))))
    for stage in (train, evaluate, visualize):
        stage.main()
    metrics = json.loads(files.METRICS.read_text())
    assert metrics["dataset"] == "toys"
    assert metrics["test"]["accuracy"] > 0.9
    assert set(metrics["test"]["per_class"]) == {"pale", "long & <red>, név"}
    for path in files.FIGURES.iterdir():
        with Image.open(path) as picture:
            picture.verify()
