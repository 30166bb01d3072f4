"""params.yaml: its defaults, and the one line that refuses anything else."""

import re
from pathlib import Path

import pytest
import torch
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from pipeline.errors import UserError
from pipeline.model.cnn import CNN, Architecture
from pipeline.params import Params, flat, read_params, with_values
from tests.conftest import QUICK, REPOSITORY, run_command, write_params

COMMITTED = (REPOSITORY / "params.yaml").read_text()


def read(folder: Path, text: str | bytes) -> Params:
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_params(path)


def refused(folder: Path, text: str | bytes) -> str:
    """The one line with which ``text`` is refused, without the file's name."""
    with pytest.raises(UserError) as error:
        read(folder, text)
    path, line = str(folder / "params.yaml"), str(error.value)
    assert "\n" not in line
    assert line.startswith(path)
    return line.removeprefix(path).lstrip(": ")


def test_the_committed_file_has_every_parameter_with_a_comment() -> None:
    written, defaults = YAML(typ="safe").load(COMMITTED), Params().model_dump(mode="json")
    for each in (written, defaults):
        each["tune"]["space"] = {}  # any parameters
    assert list(flat(written)) == list(flat(defaults))
    values = [line for line in COMMITTED.splitlines() if re.match(r" *\w+: *[^ #]", line)]
    assert [line for line in values if not re.search(r" # \S", line)] == []


def test_the_default_network_is_the_published_one() -> None:
    architecture = Architecture((28, 28, 1), tuple("0123456789"), **Params().model.model_dump())
    cnn = CNN(architecture, torch.Generator().manual_seed(0))
    assert sum(weights.numel() for weights in cnn.parameters()) == 34_826


def test_what_the_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    assert read(tmp_path, "model: {dropout: 0.25}\n") == Params().changed({"model.dropout": 0.25})
    nested = "evaluate: {promotion: {alpha: 0.05}}\nvisualize: {maximisation: {}}\n"
    assert read(tmp_path, nested) == Params().changed({"evaluate.promotion.alpha": 0.05})
    found = read(tmp_path, "tune: {space: {train.augmentation.shift: {low: 0, high: 2}}}\n")
    assert list(found.tune.space) == ["train.augmentation.shift"]
    assert read(tmp_path, "{}") == Params()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {dropout: a lot}", "model.dropout is 'a lot': input should be a valid number"),
        ("model: {dropout: 1}", "model.dropout is 1: input should be less than 1"),
        ("model: {dropout: .nan}", "model.dropout is nan: input should be a finite number"),
        ("model: {filters: [32, -4]}", "model.filters.1 is -4: input should be greater than or equal to 1"),
        ("model: {filters: [1000000000]}", "model.filters.0 is 1000000000: input should be less than or equal to 1024"),
        ("model: {filters: [32, 3.5]}", "model.filters.1 is 3.5: input should be a valid integer"),
        ("model: {filters: []}", r"model.filters is \[\]: .* at least 1 item"),
        ("model: {filters: [1, 1, 1, 1, 1, 1, 1, 1, 1]}", r"model.filters is \[1, 1, .*\]: .* at most 8 items"),
        ("model: {filters: 32}", "model.filters is 32: input should be a valid tuple"),
        ("model: {filters: {blocks: 9}}", "model.filters.blocks is 9: input should be less than or equal to 8"),
        ("model: {filters: {widht: 9}}", r"model.filters.widht is not a parameter; did you mean width\?"),
        ("model: {filters: {growth: .inf}}", "model.filters.growth is inf: input should be a finite number"),
        (
            "model: {filters: {blocks: 7, width: 32, growth: 2}}",
            "model: filters gives block 7 2,048 of them; allowed: 1 to 1,024",
        ),
        (
            "model: {filters: {blocks: 2, width: 1, growth: 0.5}}",
            "model: filters gives block 2 0 of them; allowed: 1 to 1,024",
        ),
        ("model: {padding: all}", "model.padding is 'all': input should be 'same'"),
        ("model: {padding: 16}", "model.padding is 16: input should be less than or equal to 15"),
        ("model: {convolutions: 5}", "model.convolutions is 5: input should be less than or equal to 4"),
        ("model: {dense: 5000}", "model.dense is 5000: input should be less than or equal to 4096"),
        ("model: {head: sum}", "model.head is 'sum': input should be 'flatten' or 'average'"),
        ("model: {pool: median}", "model.pool is 'median': input should be 'max', 'mean' or 'min'"),
        ("model: {batch_norm: 'no'}", "model.batch_norm is 'no': input should be a valid boolean"),
        ("model:", "model is None: input should be a valid dictionary"),
        ("train: {epochs: '15'}", "train.epochs is '15': input should be a valid integer"),
        ("train: {threads: 0}", "train.threads is 0: input should be greater than or equal to 1"),
        ("train: {device: tpu}", "train.device is 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
        ("train: {loss: hinge}", "train.loss is 'hinge': input should be 'cross-entropy'"),
        ("seed: -1", "seed is -1: input should be greater than or equal to 0"),
        ("1: 2", "1 is 1: keys should be strings"),
        ("model: {dropuot: 0.5}", r"model.dropuot is not a parameter; did you mean dropout\?"),
        ("tain: {}", r"tain is not a parameter; did you mean train\?"),
        ("colour: red", "colour is not a parameter; allowed: seed, data, model, train, evaluate, visualize, tune"),
        (
            "tune: {space: {train.augmentation.shift: {low: 0, hihg: 2}}}",
            r"tune.space.train.augmentation.shift.hihg is not a parameter; did you mean high\?",
        ),
        ("tune: {space: {}}", "tune.space is {}: .* at least 1 item"),
        ("tune: {space: {a: {low: 9, high: 8}}}", r"tune.space.a is {.*}: low \(9\) must be below high \(8\)"),
        ("tune: {space: {a: {low: 9}}}", "tune.space.a is {.*}: both low and high are needed, or choices"),
        ("tune: {space: {a: {low: 0, high: 1, log: true}}}", "tune.space.a is {.*}: .* starts above 0 and has no step"),
        ("tune: {space: {a: {low: 1, choices: [1]}}}", "tune.space.a is {.*}: choices cannot be combined"),
        ("tune: {space: {a: {choices: []}}}", r"tune.space.a.choices is \[\]: .* at least 1 item"),
        (
            "tune: {space: {a: {low: 8, high: 100, step: 8}}}",
            r"tune.space.a is {.*}: high \(100\) is not low \(8\) plus a multiple of step \(8\)",
        ),
        (
            "tune: {space: {a: {low: 0, high: 1.0e+300, step: 7.0e-300}}}",
            r"tune.space.a is {.*}: high .* a multiple of step \(7e-300\)",
        ),
    ],
)
def test_fault_22_the_line_names_the_key_what_was_given_and_what_is_allowed(
    tmp_path: Path, text: str, line: str
) -> None:
    assert re.match(line, refused(tmp_path, text))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the content is None: input should be a valid dictionary"),
        ("42", "the content is 42: input should be a valid dictionary"),
        ("[1, 2", "line 1: expected ',' or ']'"),
        ("seed: 1\nseed: 2\n", 'line 2: found duplicate key "seed"'),
        (b"\xff\xfe\x00", "is not YAML"),
        ("seed: !!python/object/apply:os.system ['touch PWNED']", "could not determine a constructor for the tag"),
        ("[" * 15_000, "line 1: aliases and nesting beyond 10 levels are not allowed"),
        ("a: &a [1]\nb: *a\n", "line 2: aliases and nesting beyond 10 levels are not allowed"),
        ("seed: 0 # " + "x" * 200_000, "has 200,010 bytes; allowed: 20,000"),
    ],
)
def test_fault_22_what_holds_no_parameters_is_refused_without_being_run(
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


def test_the_digest_follows_the_parameters_that_decide_the_model_and_no_others() -> None:
    def digest(path: str, value: object) -> str:
        return Params().changed({path: value}).sha256

    same = Params().sha256
    others = {
        "train.threads": 2,
        "train.device": "cpu",
        "visualize.mistakes": 3,
        "tune.trials": 3,
        "evaluate.metric": "balanced_accuracy",
    }
    assert {digest(path, value) for path, value in others.items()} == {same}
    decide = {"model.dropout": 0.4, "train.epochs": 14, "train.class_weights": "balanced", "seed": 1}
    assert len({same, *(digest(path, value) for path, value in decide.items())}) == 5
    assert Params().recipe["train.loss"] == "cross-entropy"


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        ("{}", (32, 64, 128, 256)),
        ("{blocks: 3, width: 16, growth: 2}", (16, 32, 64)),
        ("{blocks: 4, width: 10, growth: 1.5}", (10, 15, 22, 34)),  # 22.5 and 33.75
        ("{blocks: 3, width: 8, growth: 1.0}", (8, 8, 8)),
        ("{blocks: 6, width: 32, growth: 2.0}", (32, 64, 128, 256, 512, 1024)),
    ],
)
def test_filters_may_grow_by_a_rule(tmp_path: Path, rule: str, counts: tuple[int, ...]) -> None:
    params = read(tmp_path, f"model: {{filters: {rule}}}\n")
    assert params.model.filter_counts() == counts
    assert params == params.changed({"train.epochs": params.train.epochs})
    assert set(params.by_path()) >= {"model.filters.blocks", "model.filters.width", "model.filters.growth"}
    assert params.changed({"model.filters.blocks": 1}).model.filter_counts() == counts[:1]


def test_what_is_at_a_path_may_be_a_whole_list() -> None:
    params = Params()
    assert [params.value(path) for path in ("model.filters", "model.filters.1", "seed")] == [[32, 64], 64, 0]
    for path in ("model.filters.2", "model.filters.-1", "model.filters.width", "model.filter", "seed.x", "tune.trials"):
        with pytest.raises(KeyError):
            params.value(path)


def test_a_network_that_is_trained_may_have_the_parameters_of_a_space(tmp_path: Path) -> None:
    grows = "model: {filters: {blocks: 3}}\ntune: {space: {model.filters.blocks: {low: 2, high: 4}, "
    read(tmp_path, f"{grows} model.filters.growth: {{low: 1.0, high: 2.0}}}}}}").check_space()
    whole = "tune: {space: {model.filters: {choices: [[32, 64], [16, 32, 64]]}, "
    read(
        tmp_path, f"{whole} model.padding: {{choices: [0, same]}}, model.dense: {{choices: [null, 64]}}}}}}"
    ).check_space()
    for text, problem in (
        (f"{whole} model.filters.1: {{low: 8, high: 9}}}}}}", "model.filters.1 is a part of model.filters, which is"),
        ("tune: {space: {model.filters: {low: 8, high: 9}}}", r"model.filters is \[32, 64\], which is not a number"),
        ("tune: {space: {model.filters: {choices: [[32, 0]]}}}", "model.filters.1 is 0: input should be greater"),
        ("tune: {space: {model.filters.width: {low: 8, high: 9}}}", "model.filters.width is not one of the current"),
        (f"{grows} model.filters.0: {{low: 8, high: 9}}}}}}", "model.filters.0 is not one of the current parameters"),
        ("tune: {space: {model: {choices: [1]}}}", "model cannot be tuned; allowed: "),
    ):
        with pytest.raises(UserError, match=f"tune.space: {problem}"):
            read(tmp_path, text).check_space()


def with_space(**ranges: object) -> Params:
    return Params().changed({"tune.space": {path.replace("__", "."): each for path, each in ranges.items()}})


def test_a_range_does_not_forbid_training_another_network() -> None:
    params = Params().changed({"model.filters": [16]})
    assert params.model.filters == (16,)
    with pytest.raises(
        UserError, match=r"^params.yaml: tune.space: model.filters.1 is not one of the current parameters"
    ):
        params.check_space()


@pytest.mark.faults
def test_a_range_that_does_not_fit_is_refused_by_tune(workspace: Path) -> None:
    write_params(workspace, QUICK | {"model.filters": [16]})
    done = run_command("tune", folder=workspace)
    assert done.returncode == 2
    line = "error: params.yaml: tune.space: model.filters.1 is not one of the current parameters\n"
    assert done.stderr.decode() == line


def test_every_range_that_does_not_fit_is_named() -> None:
    Params().check_space()
    with_space(train__augmentation__rotation={"low": 0, "high": 30, "step": 5}).check_space()
    params = with_space(
        train__augmentation__rotation={"low": 0, "high": 181},
        model__dropuot={"low": 0.0, "high": 0.5},
        model__filters__0={"low": 0, "high": 96, "step": 8},
        model__filters__1={"low": 8, "high": 96, "step": 0.5},
        model__dropout={"low": 0.0, "high": 1.0},
        model__batch_norm={"low": 0, "high": 1},
        model__pool={"choices": ["max", "median"]},
        model__padding={"choices": [0, 1]},
        train__epochs={"low": 1, "high": 9},
        data__split_seed={"low": 1, "high": 9},
    )
    with pytest.raises(UserError) as error:
        params.check_space()
    found = str(error.value).removeprefix("params.yaml: tune.space: ").split("; ")
    for part in (
        "model.dropuot is not one of the current parameters",
        "model.filters.0 is 0: input should be greater than or equal to 1",
        "model.filters.1 is 8.5: input should be a valid integer",
        "model.dropout is 1.0: input should be less than 1",
        "model.batch_norm is False, which is not a number: it needs choices instead of low and high",
        "model.pool is 'median': input should be 'max', 'mean' or 'min'",
        "train.epochs cannot be tuned",
        "data.split_seed cannot be tuned",
        "train.augmentation.rotation is 181.0: input should be less than or equal to 180",
    ):
        assert part in found, part
    assert "model.padding" not in str(error.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_ends_of_lines_and_the_byte_order_mark_stay(mark: bytes, line_end: bytes) -> None:
    """As editors on Windows write them."""
    content = mark + b"# gr\xc3\xbcn\ntrain:\n  epochs: 3  # few\n".replace(b"\n", line_end)
    assert with_values(content, {"train.epochs": 4}) == content.replace(b"3", b"4")


def test_values_are_written_and_nothing_else_changes() -> None:
    values = {"model.filters.1": 128, "model.dropout": 0.35, "train.optimizer": "adamw", "train.threads": 2}
    written = with_values(COMMITTED.encode(), values).decode()
    before, after = COMMITTED.splitlines(), written.splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split("#")[0].strip() for _, new in changed] == [
        "filters: [32, 128]",
        "dropout: 0.35",
        "optimizer: adamw",
        "threads: 2",
    ]
    assert all(old.split("#")[1] == new.split("#")[1] for old, new in changed)  # the comments, in their places
    assert with_values(COMMITTED.encode(), {}).decode() == COMMITTED
    with pytest.raises(ValueError, match=r"^model\.filters\.2 is not a parameter"):
        with_values(COMMITTED.encode(), {"model.filters.2": 1})


def test_a_list_and_a_rule_are_written_on_their_line(tmp_path: Path) -> None:
    written = with_values(COMMITTED.encode(), {"model.filters": [16, 32, 64]}).decode()
    changed = [line for line in written.splitlines() if line not in COMMITTED.splitlines()]
    assert [re.sub(" +#.*", "", line) for line in changed] == ["  filters: [16, 32, 64]"]
    assert changed[0].split("#")[1] in COMMITTED
    rule = COMMITTED.replace("filters: [32, 64]", "filters: {blocks: 3, width: 8, growth: 1.5}")
    values = {"model.filters.width": 16, "model.filters.growth": 2.0, "model.filters.blocks": 4}
    (line,) = set(with_values(rule.encode(), values).decode().splitlines()) - set(rule.splitlines())
    assert line.startswith("  filters: {blocks: 4, width: 16, growth: 2.0}  ")
    with pytest.raises(ValueError, match=r"^model\.filters\.0 is not a parameter"):
        with_values(rule.encode(), {"model.filters.0": 8})


def test_dvc_sets_a_count_of_a_list_and_a_part_of_a_rule(tmp_path: Path) -> None:
    """As `dvc exp run -S` does."""
    path = tmp_path / "params.yaml"
    path.write_text(COMMITTED)
    apply_overrides(str(path), ["model.filters.0=16", "model.padding=same", "model.dense=64"])
    assert read_params(path).model.filters == (16, 64)
    assert (read_params(path).model.padding, read_params(path).model.dense) == ("same", 64)
    path.write_text(COMMITTED.replace("filters: [32, 64]", "filters: {blocks: 3, width: 8, growth: 1.5}"))
    apply_overrides(str(path), ["model.filters.width=16", "model.filters.blocks=2"])
    assert read_params(path).model.filter_counts() == (16, 24)


def test_a_value_that_the_file_leaves_out_is_added(tmp_path: Path) -> None:
    values = {"model.filters.1": 128, "train.epochs": 3, "evaluate.promotion.alpha": 0.05}
    written = with_values(b"# mine\ntrain:\n  augmentation:\n    shift: 1  # pixel\n", values).decode()
    assert written.startswith("# mine\ntrain:\n  augmentation:\n    shift: 1  # pixel\n  epochs: 3\n")
    assert read(tmp_path, written) == Params().changed(values | {"train.augmentation.shift": 1})


def test_parameters_with_other_values_are_checked_like_the_file() -> None:
    assert Params().changed({"model.filters.1": 8, "train.epochs": 3}).model.filters == (32, 8)
    assert Params().by_path()["model.filters.1"] == 64
    for values in ({"model.filters.1": 0}, {"model.filter": 1}, {"model.dropout.x": 1}, {"model.dropout": "a lot"}):
        with pytest.raises(ValueError):  # pydantic's own is one
            Params().changed(values)
