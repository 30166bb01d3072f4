"""The rules of the house: who may import what, what happens at import, and what dvc.yaml says of it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.params import Params
from tests.conftest import REPOSITORY

PIPELINE = REPOSITORY / "pipeline"
MODULES = sorted(PIPELINE.rglob("*.py"))
DVC = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")
STAGES = ("prepare", "train", "evaluate", "visualize")


def imported(module: Path) -> set[str]:
    """The dotted names that a module imports, wherever in it; for `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where things are"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def closure(module: Path) -> set[Path]:
    """The module and every module of this project that it imports, directly or not; pipeline/tracking left out.

    What is told to MLflow changes no output, so a change of tracking must not train anew.
    """
    found, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current in found or current.parent.name == "tracking":
            continue
        found.add(current)
        for name in imported(current):
            path = REPOSITORY / (name.replace(".", "/") + ".py")
            if path.exists():
                waiting.append(path)
    return found


def importers(package: str) -> set[str]:
    return {
        str(module.relative_to(PIPELINE))
        for module in MODULES
        if any(name == package or name.startswith(package + ".") for name in imported(module))
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_module_that_it_imports(stage: str) -> None:
    declared = {dep for dep in DVC["stages"][stage]["deps"] if dep.startswith("pipeline/")}
    needed = {str(path.relative_to(REPOSITORY)) for path in closure(PIPELINE / f"{stage}.py")}
    assert declared == needed


def test_packages_hold_a_sentence_and_no_code() -> None:
    for package in PIPELINE.rglob("__init__.py"):
        docstring, *code = ast.parse(package.read_text()).body
        assert isinstance(docstring, ast.Expr)
        if package.parent.name == "tracking":  # a default that mlflow must find when it is imported
            assert [ast.unparse(line) for line in code] == [
                "import os",
                "os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')",
            ]
        elif package.parent == PIPELINE:  # has to be said before the libraries are imported
            assert [ast.unparse(line) for line in code] == ["from pipeline.startup import begin", "begin()"]
        else:
            assert not code


def test_one_file_is_one_stage_is_one_section() -> None:
    assert tuple(DVC["stages"]) == STAGES
    sections = set(Params.model_fields) - {"seed"}
    for stage in STAGES:
        assert (PIPELINE / f"{stage}.py").exists()
        assert DVC["stages"][stage]["cmd"] == f"python -m pipeline.{stage}"
        read = {name.split(".")[0] for name in DVC["stages"][stage]["params"]}  # or single knobs by their paths
        assert read <= sections | {"seed"}
    assert set(STAGES) - {"prepare"} | {"data", "model", "tune"} == sections


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "mlflow",
            {
                f"tracking/{name}.py"
                for name in ("delivery", "faults", "models", "registry", "runs", "serving", "studies")
            },
        ),
        (
            "optuna",
            {"tuning/coordinator.py", "tuning/plots.py", "tuning/space.py", "tuning/storage.py", "tuning/study.py"},
        ),
        ("ruamel", {"dvc_files.py", "params.py"}),
        ("torchvision", {"images/sources.py"}),
        ("mlxtend", {"images/sources.py"}),
        (
            "matplotlib",
            {
                "figures/canvas.py",
                "figures/curves.py",
                "figures/network.py",
                "figures/scores.py",
                "gallery.py",
                "tuning/plots.py",
            },
        ),
        ("numba", {"network/kernels.py"}),
        ("PIL", {"images/pictures.py"}),
        ("scipy", {"tracking/gate.py"}),
    ],
)
def test_each_library_has_one_place(package: str, allowed: set[str]) -> None:
    assert importers(package) == allowed


def test_libraries_never_import_a_command() -> None:
    commands = {f"pipeline.{path.stem}" for path in PIPELINE.glob("*.py") if "__main__" in path.read_text()}
    assert len(commands) >= 4
    for command in commands:
        assert importers(command) == set()


def test_the_network_knows_neither_files_nor_tracking() -> None:
    for module in (PIPELINE / "network").glob("*.py"):
        ours = {name for name in imported(module) if name.startswith("pipeline")}
        assert {name for name in ours if not name.startswith(("pipeline.model", "pipeline.errors"))} <= {"pipeline"}


def test_the_test_images_are_opened_by_the_final_stages_alone() -> None:
    readers = {module.name for module in MODULES if re.search(r"\bread_split\b", module.read_text())} - {"splits.py"}
    # The doctor looks at whether the files are whole, and at nothing in them.
    assert readers == {"train.py", "tune.py", "worker.py", "evaluate.py", "visualize.py", "doctor.py"}
    for module in ("train.py", "tune.py", "tuning/worker.py"):
        assert not re.search(r"\bTEST\b|\"test\"", (PIPELINE / module).read_text())


def test_only_sources_knows_a_data_set_by_name() -> None:
    for module in MODULES:
        if module.name != "sources.py":
            names = [text for text in _strings(module) if "mnist" in text.lower() or "cifar" in text.lower()]
            assert names == [], module


def _strings(module: Path) -> Iterator[str]:
    tree = ast.parse(module.read_text())
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            yield node.value


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in MODULES]
    code = "\n".join(["import random, torch", "before = torch.get_rng_state()", *(f"import {name}" for name in names)])
    code += "\nassert torch.equal(before, torch.get_rng_state()); import mlflow"
    code += "\nassert not mlflow.is_tracking_uri_set()"
    code += "\nassert mlflow.telemetry.get_telemetry_client() is None"  # usage statistics are not sent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []
