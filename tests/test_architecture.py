"""The rules of the architecture: which module may import which, import side effects, and the deps in dvc.yaml."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.params import Params
from tests.conftest import REPOSITORY

PIPELINE = REPOSITORY / "pipeline"
MODULES = sorted(PIPELINE.rglob("*.py"))
DVC = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")
STAGES = ("prepare", "train", "evaluate", "visualize")
MAX_IMPORT_DEPTH = 6


def name_of(module: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = module.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(module): module for module in [*MODULES, *sorted((REPOSITORY / "bench").rglob("*.py"))]}


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


def imports() -> dict[str, set[str]]:
    """For each module of pipeline/ and bench/ those of the same that it imports. `pipeline` itself is left out."""
    known = set(SOURCES) - {"pipeline"}
    return {name: imported(SOURCES[name]) & known - {name} for name in known}


def package_of(name: str) -> str:
    """The package of a module; a module at the top of pipeline/ counts as its own package."""
    return "bench" if name.startswith("bench") else ".".join(name.split(".")[:2])


def package_imports() -> dict[str, set[str]]:
    """Which packages each package imports."""
    found: dict[str, set[str]] = {}
    for name, others in imports().items():
        found.setdefault(package_of(name), set()).update({package_of(other) for other in others} - {package_of(name)})
    return found


def import_chains(graph: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """For each node the longest chain of imports below it, itself at the end. Raises CycleError."""
    chains: dict[str, list[str]] = {}
    for node in TopologicalSorter(graph).static_order():
        below = max((chains[other] for other in graph[node]), key=len, default=[])
        chains[node] = [*below, node]
    return chains


def test_there_are_no_import_cycles_and_the_import_depth_is_at_most_six() -> None:
    import_chains(imports())
    highest = max(import_chains(package_imports()).values(), key=len)
    assert len(highest) <= MAX_IMPORT_DEPTH, " < ".join(highest)


def importers(package: str) -> set[str]:
    return {
        str(module.relative_to(PIPELINE))
        for module in MODULES
        if any(name == package or name.startswith(package + ".") for name in imported(module))
    }


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("mlflow", ("tracking/",)),
        ("optuna", ("tuning/",)),
        ("ruamel", ("params.py",)),
        ("matplotlib", ("figures/", "tuning/plots.py", "explain/report")),  # there for the type of a figure
        ("numba", ("model/cpu_", "model/kernel_cache.py")),
        ("PIL", ("data/image_files.py", "data/contact_sheets.py", "data/strokes.py")),
        ("torchvision", ("data/published.py",)),
        ("mlxtend", ("data/sources.py",)),
        ("scipy", ("tracking/gate.py", "data/duplicates.py")),
        ("pyarrow", ("data/label_table.py",)),
    ],
)
def test_each_large_library_is_imported_in_one_place(library: str, allowed: tuple[str, ...]) -> None:
    found = importers(library)
    assert found
    elsewhere = sorted(module for module in found if not module.startswith(allowed))
    places = ", ".join(f"pipeline/{place}" for place in allowed)
    assert elsewhere == [], f"{library} is imported in {places} only; call or add a function there"


def test_the_model_imports_nothing_of_this_project_but_errors_and_private_folders() -> None:
    others = {other for name, found in imports().items() if package_of(name) == "pipeline.model" for other in found}
    assert {package_of(other) for other in others} <= {"pipeline.model", "pipeline.errors", "pipeline.private_folders"}


def test_libraries_and_measurements_never_import_a_command() -> None:
    commands = {name for name, path in SOURCES.items() if "__main__" in path.read_text() and name.count(".") == 1}
    assert {f"pipeline.{stage}" for stage in STAGES} < commands
    # bench's programs share what they measure.
    used = {(name, other) for name, others in imports().items() for other in others & commands}
    assert {(name, other) for name, other in used if not other.startswith("bench.")} == set()


def closure(stage: str, left_out: tuple[str, ...]) -> set[str]:
    """The files that a stage's command imports, directly or not, except through the packages in ``left_out``."""
    graph, found, waiting = imports(), set[str](), [f"pipeline.{stage}"]
    while waiting:
        name = waiting.pop()
        if name not in found and package_of(name) not in left_out:
            found.add(name)
            waiting += graph[name]
    return {SOURCES[name].relative_to(REPOSITORY).as_posix() for name in found}


# Code that only draws or logs changes no output, so it must not make DVC train again.
LEFT_OUT = {"train": ("pipeline.tracking", "pipeline.explain", "pipeline.figures")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_it_imports(stage: str) -> None:
    declared = [dep for dep in DVC["stages"][stage]["deps"] if dep.startswith("pipeline/")]
    needed = closure(stage, LEFT_OUT.get(stage, ("pipeline.tracking",)))

    def covers(dep: str, file: str) -> bool:
        return file == dep or file.startswith(f"{dep}/")

    assert [file for file in sorted(needed) if not any(covers(dep, file) for dep in declared)] == []
    assert [dep for dep in declared if not any(covers(dep, file) for file in needed)] == []


def test_one_file_is_one_stage_is_one_section() -> None:
    assert tuple(DVC["stages"]) == STAGES
    sections = set(Params.model_fields) - {"seed"}
    for stage in STAGES:
        assert (PIPELINE / f"{stage}.py").exists()
        assert DVC["stages"][stage]["cmd"] == f"python -m pipeline.{stage}"
        read = {name.split(".")[0] for name in DVC["stages"][stage]["params"]}  # or single parameters by their paths
        assert read <= sections | {"seed"}
    assert set(STAGES) - {"prepare"} | {"data", "model", "tune"} == sections


def words(module: Path) -> set[str]:
    """The names, attributes and texts in a module's code."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return found | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


def test_the_test_images_are_opened_by_the_final_stages_alone() -> None:
    readers = [module for module in MODULES if module.name != "splits.py" and "read_split" in words(module)]
    opening = {module.name for module in readers if words(module) & {"TEST", "SPLITS", "test"}}
    # The doctor checks that the files are whole, and uses nothing in them.
    assert opening == {"evaluate.py", "visualize.py", "doctor.py"}
    assert {module.name for module in readers} > opening


def test_only_two_modules_know_a_data_set_by_name() -> None:
    for module in MODULES:
        if module.name not in ("sources.py", "published.py", "params.py"):  # the latter has the defaults
            names = [text for text in _strings(module) if "mnist" in text.lower() or "cifar" in text.lower()]
            assert names == [], module


def _strings(module: Path) -> Iterator[str]:
    tree = ast.parse(module.read_text())
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            yield node.value


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in ``folder`` that runs ``code``."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "HOME": str(folder / "home"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    """Except that MLflow's usage statistics are off: MLflow reads that setting when it is imported."""
    done = python(
        tmp_path,
        f"""
import gc, random, signal, torch
from numba.core import config, registry

def state():
    handlers = {{each: signal.getsignal(each) for each in signal.valid_signals()}}
    settings = {{name: value for name, value in vars(config).items() if name.isupper()}}
    of_numba = settings, dict(vars(registry.cpu_target))  # what is compiled later is compiled for that target
    of_torch = torch.get_rng_state().tolist(), torch.get_num_threads()
    return of_torch, of_numba, random.getstate(), gc.get_threshold(), handlers

before = state()
{"; ".join(f"import {name_of(module)}" for module in MODULES)}
assert state() == before
import mlflow
assert not mlflow.is_tracking_uri_set()
assert mlflow.telemetry.get_telemetry_client() is None
""",
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []
