"""params.yaml as strict, frozen models. No other module reads or writes that file.

A parameter's type, bounds and default are here; its value and a comment are in params.yaml. The defaults are the
published Keras MNIST convnet (https://keras.io/examples/vision/mnist_convnet/).
"""

import codecs
import copy
import difflib
import functools
import hashlib
import io
import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from pipeline.errors import UserError, printable

PARAMS = Path("params.yaml")
MAX_FILE_SIZE = 20_000  # bytes; the committed file is about a quarter of that
MAX_NESTING = 10


class Section(BaseModel):
    """A section of params.yaml: values are not converted, unknown keys are refused, and nothing can be assigned."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


SplitFraction = Annotated[float, Field(gt=0, lt=0.5)]
Share = Annotated[float, Field(ge=0, lt=1)]
Score = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
Side = Annotated[int, Field(ge=1, le=4096)]
Level = Annotated[int, Field(ge=0, le=255)]
MAX_FILTERS = 1024  # of a block
FilterCount = Annotated[int, Field(ge=1, le=MAX_FILTERS)]


class Data(Section):
    """The data set, how pictures become images, and how they are split."""

    dataset: str = "mnist"
    offline_fallback: str | None = "mnist-5k"
    path: str = Field("data/own", min_length=1)
    labels: str | None = None
    label_pattern: str | None = None
    group: str | None = None
    image_size: Literal["auto"] | Side | Annotated[tuple[Side, Side], Field(strict=False)] = "auto"
    channels: Literal["auto", 1, 3] = "auto"
    resize: Literal["fit", "crop", "stretch", "strokes"] = "fit"
    background: Annotated[tuple[Level, Level, Level], Field(strict=False)] = (255, 255, 255)
    near_duplicates: int | None = Field(6, ge=0, le=16)
    max_bad_fraction: Share = 0.01
    validation_fraction: SplitFraction = 0.1
    test_fraction: SplitFraction = 0.2
    split_seed: Seed = 0
    memory_limit: float = Field(4.0, gt=0)


class FilterGrowth(Section):
    """Filter counts by a rule: ``width`` in the first block, and in each further one ``growth`` times as many."""

    blocks: int = Field(4, ge=1, le=8)
    width: FilterCount = 32
    growth: float = Field(2.0, ge=0.5, le=4.0)


def _either(kinds: type | tuple[type, ...], one: TypeAdapter[Any], other: TypeAdapter[Any]) -> WrapValidator:
    """Validates a value of these ``kinds`` as ``one``, and others as ``other``.

    A union would try both, and name what it tried in the path of its errors.
    """
    return WrapValidator(lambda value, _: (one if isinstance(value, kinds) else other).validate_python(value))


STRICT = ConfigDict(strict=True)
COUNTS: TypeAdapter[Any] = TypeAdapter(  # YAML has only lists
    Annotated[tuple[FilterCount, ...], Field(min_length=1, max_length=8, strict=False)], config=STRICT
)
PIXELS: TypeAdapter[Any] = TypeAdapter(Annotated[int, Field(ge=0, le=15)], config=STRICT)
BY_NAME: TypeAdapter[Any] = TypeAdapter(Literal["same"])
GROWTH: TypeAdapter[Any] = TypeAdapter(FilterGrowth)
Filters = Annotated[tuple[int, ...] | FilterGrowth, _either((dict, FilterGrowth), GROWTH, COUNTS)]
Padding = Annotated[int | Literal["same"], _either(str, BY_NAME, PIXELS)]


class Model(Section):
    """The layers of the CNN."""

    filters: Filters = (32, 64)
    convolutions: int = Field(1, ge=1, le=4)
    kernel_size: int = Field(3, ge=1, le=15)
    stride: int = Field(1, ge=1, le=8)
    padding: Padding = 0
    batch_norm: bool = False
    residual: bool = False
    pool: Literal["max", "mean", "min"] = "max"
    pool_size: int = Field(2, ge=1, le=8)
    head: Literal["flatten", "average"] = "flatten"
    dense: int | None = Field(None, ge=1, le=4096)
    dropout: Share = 0.5
    normalize: bool = False

    def filter_counts(self) -> tuple[int, ...]:
        """The filters of each block. Raises ValueError where they grow beyond what a block may have."""
        if not isinstance(self.filters, FilterGrowth):
            return self.filters
        rule = self.filters
        counts = tuple(round(rule.width * rule.growth**block) for block in range(rule.blocks))
        for number, count in enumerate(counts, 1):
            if not 1 <= count <= MAX_FILTERS:
                raise ValueError(f"filters gives block {number} {count:,} of them; allowed: 1 to {MAX_FILTERS:,}")
        return counts


class Augmentation(Section):
    """Random changes to the training images; 0 switches one off."""

    shift: int = Field(0, ge=0, le=16)
    crop_padding: int = Field(0, ge=0, le=64)
    horizontal_flip: float = Field(0.0, ge=0, le=1)
    rotation: float = Field(0.0, ge=0, le=180)
    scale: float = Field(0.0, ge=0, le=0.9)
    shear: float = Field(0.0, ge=0, le=60)
    elastic: float = Field(0.0, ge=0, le=64)
    brightness: Score = 0.0
    contrast: Score = 0.0
    cutout: int = Field(0, ge=0, le=256)
    mixup: float = Field(0.0, ge=0, le=10)


class Train(Section):
    """How the CNN is trained, and on which device."""

    epochs: Epochs = 15
    batch_size: int = Field(128, ge=1, le=65536)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(0.001, gt=0)
    schedule: Literal["constant", "one-cycle"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    loss: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    augmentation: Augmentation = Augmentation()
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, le=1024)
    checkpoint_seconds: float | None = Field(60.0, gt=0)
    live_images: bool = True


MACHINE_PARAMETERS = ("device", "threads", "checkpoint_seconds", "live_images")  # of train; not part of the recipe


class Promotion(Section):
    """What a model must reach to become champion; None for no requirement."""

    min_accuracy: Score | None = None
    min_balanced_accuracy: Score | None = None
    max_ece: Score | None = None
    max_parameters: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0, lt=1)


class Evaluate(Section):
    """How the trained CNN is scored, and when it becomes champion."""

    metric: Literal["accuracy", "balanced_accuracy"] = "accuracy"
    calibration_bins: int = Field(15, ge=2, le=100)
    promotion: Promotion = Promotion()


class Maximisation(Section):
    """Gradient ascent on the pixels of images that excite a class or a filter."""

    steps: int = Field(200, ge=1, le=10_000)
    step_size: float = Field(0.05, gt=0, le=1)
    noise: float = Field(0.1, ge=0, le=0.5)
    l1: float = Field(30.0, ge=0)
    total_variation: float = Field(150.0, ge=0)
    jitter: int = Field(2, ge=0, le=16)
    seed: Seed = 0


class Visualize(Section):
    """What the figures show."""

    image: int = Field(0, ge=0)
    mistakes: int = Field(25, ge=1, le=100)
    patches: int = Field(9, ge=1, le=25)
    occlusion_side: int = Field(6, ge=1, le=64)
    maximisation: Maximisation = Maximisation()


class Range(Section):
    """The values that a trial may choose: from ``low`` to ``high``, both included, or one of ``choices``."""

    low: float | None = None
    high: float | None = None
    step: float | None = Field(None, gt=0)
    log: bool = False
    choices: list[Any] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if self.choices is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("choices cannot be combined with low, high, step or log")
            return self
        if self.low is None or self.high is None:
            raise ValueError("both low and high are needed, or choices")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range starts above 0 and has no step")
        low, high, step = (Fraction(str(number or 0)) for number in (self.low, self.high, self.step))
        if step and (high - low) % step:  # exact: as floats, 0.6 is not a multiple of 0.05
            raise ValueError(f"high ({self.high:g}) is not low ({self.low:g}) plus a multiple of step ({self.step:g})")
        return self


class Tune(Section):
    """The tuning study. A key of ``space`` is the dotted path of a parameter."""

    trials: int = Field(50, ge=1)
    epochs: Epochs = 5
    second_objective: Literal["parameters", "multiply_adds"] | None = None
    finalists: int = Field(3, ge=1, le=100)
    seeds: int = Field(5, ge=2, le=1000)
    space: dict[str, Range] = Field(
        {
            "model.filters.0": Range(low=8, high=96, step=8),
            "model.filters.1": Range(low=8, high=128, step=8),
            "model.dropout": Range(low=0.0, high=0.6, step=0.05),
        },
        min_length=1,
    )


NOT_TUNED = tuple(f"train.{name}" for name in ("epochs", "precision", *MACHINE_PARAMETERS))


class Params(Section):
    """The whole of params.yaml."""

    seed: Seed = 0
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    visualize: Visualize = Visualize()
    tune: Tune = Tune()

    @property
    def recipe(self) -> dict[str, object]:
        """The parameters that decide the trained model, by their dotted paths.

        Not those of data: the SHA-256 of the prepared images, which stands beside the recipe, says all of them.
        """
        rest: Any = {"data": True, "evaluate": True, "visualize": True, "tune": True, "train": set(MACHINE_PARAMETERS)}
        return flat(self.model_dump(mode="json", exclude=rest))

    @property
    def sha256(self) -> str:
        """One digest for the recipe."""
        return digest(self.recipe)

    def by_path(self) -> dict[str, object]:
        """All values but those of ``tune``, by their dotted paths; each item of a list has one, as model.filters.0."""
        return flat(self.model_dump(exclude={"tune"}))

    def value(self, path: str) -> object:
        """What is at a dotted path, but for ``tune``: a value, or a list or mapping of them. Raises KeyError."""
        found: Any = self.model_dump(mode="json", exclude={"tune"})
        try:
            for key in _keys(path):
                found = found[key]
        except (IndexError, TypeError):
            raise KeyError(path) from None
        return found

    def changed(self, values: Mapping[str, object]) -> "Params":
        """The same parameters with other values at some dotted paths. Raises ValueError for a bad path or value."""
        content = self.model_dump(mode="json")
        for path, value in values.items():
            _put(content, path, value)
        return Params.model_validate(content)

    def check_space(self) -> None:
        """Raises UserError, naming every range of ``tune.space`` that does not fit the other parameters."""
        problems = [_problem(self, path, space) for path, space in self.tune.space.items()]
        if any(problems):
            raise UserError(f"{PARAMS}: tune.space: {'; '.join(printable(each) for each in problems if each)}")


def _problem(params: Params, path: str, space: Range) -> str | None:
    """Why a trial cannot choose this parameter from this range, if it cannot."""
    try:
        present = params.value(path)
    except KeyError:
        return f"{path} is not one of the current parameters"
    if whole := [other for other in params.tune.space if is_under(path, [other]) and path != other]:
        return f"{path} is a part of {whole[0]}, which is chosen as a whole: remove one of the two"
    if not path.startswith(("model.", "train.")) or path in NOT_TUNED:
        return f"{path} cannot be tuned; allowed: parameters of model and train, except {', '.join(NOT_TUNED)}"
    if space.choices is None and type(present) not in (int, float):
        return f"{path} is {present!r}, which is not a number: it needs choices instead of low and high"
    try:
        for value in space.choices or _ends_and_first_step(space, whole=isinstance(present, int)):
            params.changed({path: value})
    except ValidationError as error:
        return _explained(error)
    return None


def _ends_and_first_step(space: Range, whole: bool) -> list[float]:
    """Three values of a range: if they are valid for a parameter, all are. ``whole``: the parameter is an integer."""
    assert space.low is not None
    assert space.high is not None
    values = (space.low, space.high, space.low + (space.step or 0))
    return [int(value) if whole and value.is_integer() else value for value in values]


def is_under(path: str, others: Collection[str]) -> bool:
    """Whether a dotted path is one of ``others``, or a part of what is there."""
    return any(f"{path}.".startswith(f"{other}.") for other in others)


def digest(recipe: Mapping[str, object]) -> str:
    """The SHA-256 of a recipe, whether from params.yaml or from a model file."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """A text for each dotted path whose value differs."""
    return [
        f"{path} was {before.get(path)}, here it is {now.get(path)}"
        for path in sorted({*before, *now})
        if before.get(path) != now.get(path)
    ]


def flat(section: Mapping[Any, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, whose keys are dotted paths. A tuple is a mapping from its indices; a list is a value."""
    found: dict[str, object] = {}
    for key, value in section.items():
        inside = dict(enumerate(value)) if isinstance(value, tuple) else value
        found |= flat(inside, f"{prefix}{key}.") if isinstance(inside, Mapping) else {f"{prefix}{key}": value}
    return found


def _keys(path: str) -> list[str | int]:
    """Those of the mappings and lists on the way to a dotted path."""
    return [int(key) if key.isdecimal() else key for key in path.split(".")]


def _put(content: dict[str, Any], path: str, value: object) -> None:
    """Set the value at a dotted path, adding missing sections to ``content``. Raises ValueError."""
    inside: Any = content
    default: Any = Params().model_dump(mode="json")
    *above, last = _keys(path)
    try:
        for key in above:
            default = default[key]
            inside = inside.setdefault(key, {} if isinstance(default, dict) else default)
        known: Any = default if isinstance(default, dict) else inside  # a list may be longer, or a mapping instead
        known[last]  # must exist
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ValueError(f"{path} is not a parameter") from None
    inside[last] = value


def read_params(path: Path = PARAMS) -> Params:
    """The parameters in ``path``; missing ones have their defaults.

    Raises UserError, in one line that names the key, what was given and what is allowed.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run this in the repository's root") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: `git restore {path}` brings the file back") from None
    if len(content) > MAX_FILE_SIZE:
        raise UserError(f"{path} has {len(content):,} bytes; allowed: {MAX_FILE_SIZE:,}")
    try:
        params = Params.model_validate(parse_yaml(content, path))
        params.model.filter_counts()  # must not grow too far
    except ValidationError as error:
        raise UserError(f"{path}: {printable(_explained(error))}") from None
    except ValueError as error:
        raise UserError(f"{path}: model: {error}") from None
    return params


def check_model(values: Mapping[str, object]) -> None:
    """Raises ValueError, in one line, for values of ``model`` that params.yaml may not have."""
    try:
        Params.model_validate({"model": dict(values)})
    except ValidationError as error:
        raise ValueError(_explained(error)) from None


def with_values(content: bytes, values: Mapping[str, object]) -> bytes:
    """A params.yaml with other values at some dotted paths, added where it leaves them out.

    Everything else stays as it is: comments, the ends of lines, a byte order mark.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = MAX_FILE_SIZE  # lines are not wrapped
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    tree = yaml.load(content.decode("utf-8-sig").replace("\r\n", "\n")) or {}
    for path, value in values.items():
        _put(tree, path, _on_one_line(value))
    text = io.StringIO()
    yaml.dump(tree, text)
    line_end = b"\r\n" if b"\r\n" in content else b"\n"
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    return mark + text.getvalue().encode().replace(b"\n", line_end)


def _on_one_line(value: object) -> object:
    """A list of numbers as [1, 2] in YAML, whose comment then stays beside it."""
    if not isinstance(value, list):
        return value
    written = CommentedSeq(value)
    written.fa.set_flow_style()
    return written


def parse_yaml(content: bytes, path: Path) -> object:
    """What a YAML file holds. Raises UserError, in one line, for a file that is not YAML or that contains aliases."""
    return copy.deepcopy(_parsed(content, path))


@functools.lru_cache(maxsize=8)
def _parsed(content: bytes, path: Path) -> object:
    """Kept, since a stage reads the same files several times, and parsing one takes 50 ms."""
    yaml = YAML(typ="safe", pure=True)
    try:
        _refuse_bombs(yaml, content, path)
        return yaml.load(content)
    except MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: {place}{printable(_one_line(str(error.problem)))}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {printable(_one_line(str(error)))}") from None


def _refuse_bombs(yaml: YAML, content: bytes, path: Path) -> None:
    """A few nested aliases stand for billions of values, and the cost of nesting is quadratic in its depth."""
    depth = 0
    for event in yaml.parse(content):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent) or depth > MAX_NESTING:
            line = event.start_mark.line + 1
            raise UserError(f"{path}: line {line}: aliases and nesting beyond {MAX_NESTING} levels are not allowed")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _explained(error: ValidationError) -> str:
    """The first thing that is wrong: the key, what was given and, in pydantic's words, what is allowed."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(key) for key in first["loc"]) or "the content"
    if first["type"] == "extra_forbidden":
        return f"{name} is not a parameter; {_suggestion(first['loc'])}"
    reason = first["msg"].removeprefix("Value error, ").split(" or instance of ")[0]
    return f"{name} is {_given(first['input'])}: {reason[0].lower()}{reason[1:]}"


def _suggestion(keys: Sequence[int | str]) -> str:
    """Valid keys to use instead of an unknown one."""
    *above, unknown = (str(key) for key in keys)
    section = Params().model_dump()
    for key in above:
        section = section.get(key) or next(iter(section.values()))  # all ranges of tune.space have the same keys
        section = section if isinstance(section, dict) else FilterGrowth().model_dump()  # instead of a list
    close = difflib.get_close_matches(unknown, section, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(section)}"


def _given(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to write such a number
        return "a number of thousands of digits"
