"""params.yaml: what stands in it, and the one line that answers what may not."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.params import MACHINE, NOT_TUNED, read_params, with_values
from tests.conftest import PARAMS, REPOSITORY

PUBLISHED = PARAMS.read_text()
CHOSEN = f"knobs of model and train, except {', '.join(NOT_TUNED)}"


def refused(folder: Path, text: str | bytes) -> str:
    """The one line with which ``text`` is refused, without the file's name."""
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_params(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path)).lstrip(": ")


def test_the_published_recipe() -> None:
    params = read_params(PARAMS)
    assert params.data.dataset == "mnist"
    assert params.data.validation_fraction == 0.1
    assert params.model.model_dump() == {
        "filters": (32, 64),
        "kernel_size": 3,
        "stride": 1,
        "padding": 0,
        "pool": "max",
        "pool_size": 2,
        "dropout": 0.5,
        "batch_norm": False,
    }
    assert params.train.model_dump(exclude=set(MACHINE)) == {
        "epochs": 15,
        "batch_size": 128,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "schedule": "constant",
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "max_shift": 0,
        "precision": "float32",
    }


def test_the_file_of_this_checkout_is_valid() -> None:
    read_params(REPOSITORY / "params.yaml")


def test_every_knob_has_a_comment() -> None:
    lines = [line for line in PUBLISHED.splitlines() if line.startswith("  ") and not line.startswith("    ")]
    assert len(lines) > 25
    assert [line for line in lines if "#" not in line] == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("dropout: 0.5", "dropout: a lot", "model.dropout is 'a lot'; allowed: a number >= 0 and < 1"),
        ("dropout: 0.5", "dropout: 1", "model.dropout is 1; allowed: a number >= 0 and < 1"),
        ("dropout: 0.5", "dropout: .nan", "model.dropout is nan; allowed: a number >= 0 and < 1"),
        ("dropout: 0.5", "dropuot: 0.5", "model.dropuot is not a parameter; did you mean dropout?"),
        ("[32, 64]", "[32, -4]", "model.filters.1 is -4; allowed: an integer >= 1 and <= 1024"),
        ("[32, 64]", "[1000000000]", "model.filters.0 is 1000000000; allowed: an integer >= 1 and <= 1024"),
        ("[32, 64]", "[32, 3.5]", "model.filters.1 is 3.5; allowed: an integer >= 1 and <= 1024"),
        ("[32, 64]", "[]", "model.filters is []; allowed: a list of 1 to 8, each an integer >= 1 and <= 1024"),
        ("pool: max", "pool: median", "model.pool is 'median'; allowed: max | mean | min"),
        ("batch_norm: false", "batch_norm: 'no'", "model.batch_norm is 'no'; allowed: true | false"),
        ("epochs: 15", "epochs: '15'", "train.epochs is '15'; allowed: an integer >= 1 and <= 10000"),
        ("threads: null", "threads: 0", "train.threads is 0; allowed: an integer >= 1 and <= 1024 or null"),
        ("device: auto", "device: tpu", "train.device is 'tpu'; allowed: auto | cpu | cuda"),
        ("\nseed: 0", "\nseed: -1", "seed is -1; allowed: an integer >= 0 and <= 4294967295"),
        ("\ntrain:", "\ntain:", "tain is not a parameter; did you mean train?"),
        (
            "low: 8, high: 96",
            "low: 100, high: 96",
            "tune.space.model.filters.0 is {'high': 96, 'low': 100, 'step': 8}: low (100) must be below high (96)",
        ),
        (
            "[32, 64]",
            "[1, 1, 1, 1, 1, 1, 1, 1, 1]",
            "model.filters is [1, 1, 1, 1, 1, 1, ...]; allowed: a list of 1 to 8, each an integer >= 1 and <= 1024",
        ),
        ("\nseed: 0", "\n1: 2\nseed: 0", "1 is not a parameter; the names of knobs are text"),
        ("model.dropout: {", "model.dropuot: {", "tune.space names model.dropuot, which is not a parameter"),
        ("model.filters.1: {", "model.filters.2: {", "tune.space names model.filters.2, which is not a parameter"),
        (
            "{low: 8, high: 96, step: 8}",
            "{low: 8, high: 96, step: 0.5}",
            "tune.space.model.filters.0 has a fraction; low, high and step are integers there",
        ),
        (
            "{low: 8, high: 96, step: 8}",
            "{low: 0, high: 96, step: 8}",
            "tune.space.model.filters.0 has 0; allowed: an integer >= 1 and <= 1024",
        ),
        (
            "{low: 8, high: 96, step: 8}",
            "{low: 8, high: 100, step: 8}",
            "tune.space.model.filters.0: from low 8, steps of 8 do not lead to high 100",
        ),
        (
            "{low: 0.0, high: 0.6, step: 0.05}",
            "{low: 0.0, high: 1.0}",
            "tune.space.model.dropout has 1.0; allowed: a number >= 0 and < 1",
        ),
        (
            "model.dropout: {low",
            "model.pool: {low",
            "tune.space.model.pool has low and high; a knob that is 'max' needs choices",
        ),
        (
            "model.dropout: {low: 0.0, high: 0.6, step: 0.05}",
            "model.pool: {choices: [max, median]}",
            "tune.space.model.pool has 'median'; allowed: max | mean | min",
        ),
        (
            "model.dropout: {low: 0.0, high: 0.6, step: 0.05}",
            "train.epochs: {low: 1, high: 9}",
            "tune.space names train.epochs; a trial chooses " + CHOSEN,
        ),
        (
            "model.dropout: {low: 0.0, high: 0.6, step: 0.05}",
            "data.split_seed: {low: 1, high: 9}",
            "tune.space names data.split_seed; a trial chooses " + CHOSEN,
        ),
        (
            "{low: 0.0, high: 0.6, step: 0.05}",
            "{choices: [], log: true}",
            "tune.space.model.dropout.choices is []; allowed: a list of 1 or more, each a value or null",
        ),
    ],
)
def test_fault_22_the_line_names_the_key_what_was_given_and_what_is_allowed(
    tmp_path: Path, before: str, after: str, line: str
) -> None:
    assert PUBLISHED.count(before) == 1
    assert refused(tmp_path, PUBLISHED.replace(before, after)) == line


def test_a_missing_knob_is_named(tmp_path: Path) -> None:
    without = "\n".join(line for line in PUBLISHED.splitlines() if "stride:" not in line)
    assert refused(tmp_path, without) == "model.stride is missing; allowed: an integer >= 1 and <= 8"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the file is None; allowed: a section with the keys seed, data, model"),
        ("42", "the file is 42; allowed: a section"),
        ("[1, 2", "line 1: expected ',' or ']'"),
        ("seed: 1\nseed: 2\n", 'line 2: found duplicate key "seed"'),
        (b"\xff\xfe\x00", "is not YAML"),
        ("seed: !!python/object/apply:os.system ['touch PWNED']", "could not determine a constructor for the tag"),
        ("[" * 15_000, "line 1: aliases and more than 10 levels are not allowed"),
        ("a: &a [1]\nb: *a\n", "line 2: aliases and more than 10 levels are not allowed"),
        ("seed: 0 # " + "x" * 200_000, "has 200,010 bytes; allowed: 20,000"),
    ],
)
def test_fault_22_what_is_no_list_of_knobs_is_refused_without_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused(tmp_path, text)
    assert not Path("PWNED").exists()


@pytest.mark.faults
def test_fault_22_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    assert "aliases" in refused(tmp_path, bomb + "seed: *l\n")


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: run this in the repository's root"):
        read_params(tmp_path / "params.yaml")


def test_the_digest_follows_the_knobs_that_decide_the_model_and_no_others(tmp_path: Path) -> None:
    def digest(before: str, after: str) -> str:
        (tmp_path / "params.yaml").write_text(PUBLISHED.replace(before, after))
        return read_params(tmp_path / "params.yaml").sha256

    same = digest("", "")
    assert digest("threads: null", "threads: 2") == digest("device: auto", "device: cpu") == same
    assert digest("mistakes: 25", "mistakes: 3") == digest("trials: 50", "trials: 3") == same
    assert len({same, digest("dropout: 0.5", "dropout: 0.4"), digest("seed: 0  ", "seed: 1  ")}) == 3


def test_values_are_written_and_nothing_else_changes() -> None:
    knobs = {"model.filters.1": 128, "model.dropout": 0.35, "train.optimizer": "adamw", "train.threads": 2}
    written = with_values(PUBLISHED, knobs)
    before, after = PUBLISHED.splitlines(), written.splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split("#")[0].strip() for _, new in changed] == [
        "filters: [32, 128]",
        "dropout: 0.35",
        "optimizer: adamw",
        "threads: 2",
    ]
    assert all(old.split("#")[1] == new.split("#")[1] for old, new in changed)  # the comments, in their places
    assert with_values(PUBLISHED, {}) == PUBLISHED
    with pytest.raises(ValueError, match=r"^model\.filters\.2 is not a parameter"):
        with_values(PUBLISHED, {"model.filters.2": 1})


def test_parameters_with_other_values_are_checked_like_the_file() -> None:
    params = read_params(PARAMS)
    assert params.changed({"model.filters.1": 8, "train.epochs": 3}).model.filters == (32, 8)
    assert params.knobs()["model.filters.1"] == 64
    for knobs in ({"model.filters.1": 0}, {"model.filter": 1}, {"model.dropout": "a lot"}):
        with pytest.raises(ValueError):  # pydantic's own is one
            params.changed(knobs)
