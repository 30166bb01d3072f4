"""Bad input by the hundred, generated: each is refused in one line or is harmless, and nothing is half-written."""

import gzip
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from pipeline import files, prepare, train
from pipeline.data.splits import SPLITS, TRAIN, VALIDATION, read_dataset, read_split
from pipeline.errors import Fault, UserError, run_command
from pipeline.model import model_file
from pipeline.params import Params, flat, read_params
from tests.conftest import write_params
from tests.data.test_sources import publish, put, small_mnist

pytestmark = pytest.mark.faults
MAX_LINE_LENGTH = 500  # characters
# The same examples each time. One folder serves them all: whatever an example leaves there is a failure.
two_hundred = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

DEFAULTS = Params().model_dump(mode="json")
PLAIN = json.dumps(DEFAULTS, indent=0)  # JSON is YAML; it has no comments, where damage would do no harm
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from([10**6, -1, 0, 2**64, "1e3", ".nan", "!!python/name:os.system"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


@st.composite
def other_values(draw: st.DrawFn) -> bytes:
    """The defaults with something else for one parameter or section, or with one key more."""
    tree = json.loads(PLAIN)
    *above, last = draw(st.sampled_from([*flat(DEFAULTS), *DEFAULTS, "model.filters", "tune.space", "more"])).split(".")
    inside: Any = tree
    for key in above:
        inside = inside.get(key, inside)
    inside[draw(st.text(max_size=400)) if last == "more" else last] = draw(VALUES)
    return json.dumps(tree).encode()


class Whole(bytes):
    """A file's content; hypothesis prints only its size."""

    def __repr__(self) -> str:
        return f"{len(self):,} bytes"


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    return _damaged(Whole(content))


@st.composite
def _damaged(draw: st.DrawFn, content: Whole) -> bytes:
    """Bytes flipped, cut out, put in, cut off or replaced; never the same as before."""
    start = draw(st.integers(0, len(content) - 1))
    stop = draw(st.integers(start, min(len(content), start + 200)) | st.just(len(content)))
    put_in = draw(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
    ways = [
        content[:start] + bytes([content[start] ^ draw(st.integers(1, 255))]) + content[start + 1 :],
        content[:start] + put_in + content[stop:],
        put_in,
    ]
    found = draw(st.sampled_from(ways))
    assume(found != content)
    return found


def is_one_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and text.removesuffix("\n").isprintable() and len(text) <= MAX_LINE_LENGTH


def ends(command: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and standard error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(command)
    return end.value.code, capsys.readouterr().err


@two_hundred
@example(content=b"{seed: 0x" + b"f" * 10_000 + b"}")  # more digits than Python writes
@example(content=b'{"two\\nlines": 1}')
@example(content=PLAIN.replace('"seed"', f'"{"x" * 9000}"').encode())
@given(content=other_values() | damaged(PLAIN.encode()) | st.binary(max_size=500))
def test_fault_22_two_hundred_bad_params_yaml(
    content: bytes, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "params.yaml").write_bytes(content)
    there = sorted(workspace.rglob("*"))
    try:
        read_params()
    except UserError:
        code, line = ends(prepare.main, capsys)
        assert code == 2
        assert line.startswith("error: params.yaml")
        assert is_one_line(line)
        assert sorted(workspace.rglob("*")) == there
    else:
        assume(False)  # not bad: there are two hundred others


@pytest.mark.slow
@two_hundred
@given(data=st.data())
def test_fault_19_two_hundred_damaged_published_files(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = small_mnist()
    with monkeypatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path))
        patch.chdir(tmp_path)
        publish(patch, published)
        write_params(tmp_path, {"data.offline_fallback": None})
        name = data.draw(st.sampled_from(sorted(published)))
        content = data.draw(damaged(published[name]))
        put(tmp_path / "data/raw/mnist", published | {name: content})
        there = sorted(tmp_path.rglob("*"))
        code, line = ends(prepare.main, capsys)
        if unpacked(content) == unpacked(published[name]):  # a date in its header, say
            assert code == 0, line
            shutil.rmtree(tmp_path / "data/prepared")
            return
        assert code == 2
        assert name in line
        assert "delete it and run again" in line
        assert is_one_line(line)
        assert sorted(tmp_path.rglob("*")) == there


def unpacked(content: bytes) -> bytes | None:
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None


@pytest.mark.slow
@two_hundred
@given(data=st.data())
def test_fault_7_two_hundred_damaged_prepared_files(
    data: st.DataObject, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_dataset()
    name = data.draw(st.sampled_from(["dataset.json", *(f"{split}.safetensors" for split in SPLITS)]))
    path = files.PREPARED / name
    content = path.read_bytes()
    there = sorted(workspace.rglob("*"))
    path.write_bytes(data.draw(damaged(content)))
    try:
        dataset = read_dataset()
        for split in SPLITS:
            read_split(dataset, split)
    except Fault as error:
        assert str(error).startswith(f"{path} is damaged (")
        assert str(error).endswith("run `dvc repro -f prepare`")
        assert is_one_line(str(error))
        if name in ("dataset.json", f"{TRAIN}.safetensors", f"{VALIDATION}.safetensors"):
            code, line = ends(train.main, capsys)
            assert (code, line) == (1, f"error: {error}\n")
            assert sorted(workspace.rglob("*")) == there
    else:
        assert (name, dataset) == ("dataset.json", whole)  # a space more or less, say
    finally:
        path.write_bytes(content)


@two_hundred
@given(data=st.data())
def test_fault_7_two_hundred_damaged_model_files(data: st.DataObject, finished: Path) -> None:
    with pytest.raises(Fault) as error:
        model_file.from_bytes(data.draw(damaged(files.MODEL.read_bytes())))
    assert str(error.value).startswith("the model file is damaged (")
    assert is_one_line(str(error.value))
