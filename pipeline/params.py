"""params.yaml as frozen, strict models. The only reader and writer of that file."""

import difflib
import io
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from pipeline import files
from pipeline.errors import UserError, printable

PARAMS = Path("params.yaml")
LARGEST_FILE = 20_000  # bytes; the committed file has a sixth of it
DEEPEST_NESTING = 10


class Section(BaseModel):
    """A section of params.yaml: nothing is converted, nothing unknown is let in, nothing changes afterwards."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


Fraction = Annotated[float, Field(gt=0, lt=0.5)]
Share = Annotated[float, Field(ge=0, lt=1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
FilterCount = Annotated[int, Field(ge=1, le=1024)]


class Data(Section):
    """Which images, and how they are cut into splits."""

    dataset: str
    offline_fallback: str | None
    validation_fraction: Fraction
    test_fraction: Fraction
    split_seed: int = Field(ge=0, le=2**32 - 1)


class Model(Section):
    """The CNN's layers."""

    filters: tuple[FilterCount, ...] = Field(min_length=1, max_length=8, strict=False)  # YAML has lists, no tuples
    kernel_size: int = Field(ge=1, le=15)
    stride: int = Field(ge=1, le=8)
    padding: int = Field(ge=0, le=15)
    pool: Literal["max", "mean", "min"]
    pool_size: int = Field(ge=1, le=8)
    dropout: Share
    batch_norm: bool


class Train(Section):
    """How the CNN is trained, and on what."""

    epochs: Epochs
    batch_size: int = Field(ge=1, le=65536)
    optimizer: Literal["adam", "adamw", "sgd"]
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "one-cycle"]
    weight_decay: float = Field(ge=0)
    label_smoothing: Share
    max_shift: int = Field(ge=0, le=16)
    precision: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    checkpoint_seconds: Annotated[float, Field(gt=0)] | None
    live_images: bool


class Promotion(Section):
    """What a model must reach to become champion, and how sure it must be that it is better."""

    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None
    max_ece: Annotated[float, Field(ge=0, le=1)] | None
    max_parameters: Annotated[int, Field(ge=1)] | None
    alpha: Annotated[float, Field(gt=0, lt=1)] | None


class Evaluate(Section):
    """How the trained CNN is scored, and when it becomes champion."""

    calibration_bins: int = Field(ge=2, le=100)
    promotion: Promotion


class Maximisation(Section):
    """How images are made that please the network."""

    steps: int = Field(ge=1, le=10_000)
    step_size: float = Field(gt=0, le=1)
    noise: float = Field(ge=0, le=0.5)
    l1: float = Field(ge=0)
    total_variation: float = Field(ge=0)
    jitter: int = Field(ge=0, le=16)
    seed: int = Field(ge=0, le=2**32 - 1)


class Visualize(Section):
    """What the figures show."""

    image: int = Field(ge=0)
    mistakes: int = Field(ge=1, le=100)
    patches: int = Field(ge=1, le=25)
    occlusion_side: int = Field(ge=1, le=64)
    maximisation: Maximisation


class Range(Section):
    """What a tuned knob may be: a number from ``low`` to ``high``, both included, or one of ``choices``."""

    low: float | None = None
    high: float | None = None
    step: Annotated[float, Field(gt=0)] | None = None
    log: bool = False
    choices: Annotated[list[Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if self.choices is not None:
            if self.model_fields_set != {"choices"}:
                raise ValueError("choices stand alone, without low, high, step or log")
        elif self.low is None or self.high is None:
            raise ValueError("both low and high are needed, or choices")
        elif self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        elif self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range starts above 0 and has no step")
        return self


class Tune(Section):
    """What the tuning study searches. A key of ``space`` is the dotted path of a knob."""

    trials: int = Field(ge=1)
    epochs: Epochs
    second_objective: Literal["parameters", "multiply_adds"] | None
    finalists: int = Field(ge=1, le=100)
    seeds: int = Field(ge=2, le=1000)
    space: dict[str, Range] = Field(min_length=1)


MACHINE = ("device", "threads", "checkpoint_seconds", "live_images")  # knobs of train that say where and how, not what
DECIDES = set(Train.model_fields) - set(MACHINE)


class Params(Section):
    """The whole of params.yaml."""

    seed: int = Field(ge=0, le=2**32 - 1)
    data: Data
    model: Model
    train: Train
    evaluate: Evaluate
    visualize: Visualize
    tune: Tune

    @model_validator(mode="after")
    def _tunes_knobs(self) -> "Params":
        for path, space in sorted(self.tune.space.items()):
            _refuse_untunable(self, path, space)
        return self

    @property
    def recipe(self) -> dict[str, object]:
        """The knobs that decide the trained model by their dotted names; not those of the machine that trains it."""
        return flat(self.model_dump(mode="json", include={"seed": True, "data": True, "model": True, "train": DECIDES}))

    @property
    def sha256(self) -> str:
        """One digest for the recipe."""
        return digest(self.recipe)

    def knobs(self) -> dict[str, object]:
        """All knobs by their dotted paths, in which a number counts the items of a list."""
        return dict(_knobs(self.model_dump(exclude={"tune"})))

    def changed(self, knobs: Mapping[str, object]) -> "Params":
        """The same parameters with other values for some knobs. Raises ValueError for an unknown one or a bad value."""
        content = self.model_dump(mode="json", exclude_unset=True)
        for path, value in knobs.items():
            _put(content, path, value)
        return Params.model_validate(content)


def digest(recipe: Mapping[str, object]) -> str:
    """The SHA-256 of a recipe, of these parameters or of those in a model file."""
    return files.sha256(json.dumps(recipe, sort_keys=True).encode())


def flat(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, whose keys are dotted paths."""
    found: dict[str, object] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _put(content: dict[str, Any], path: str, value: object) -> None:
    """Give the knob at a dotted path another value. Raises ValueError."""
    inside: Any = content
    *above, last = _keys(path)
    for key in above:
        inside = inside[key]
    try:
        inside[last]  # a knob that is not there must not be made
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{path} is not a parameter") from None
    inside[last] = value


def _keys(path: str) -> list[str | int]:
    return [int(key) if key.isdigit() else key for key in path.split(".")]


NOT_TUNED = (
    "train.checkpoint_seconds",
    "train.device",
    "train.epochs",
    "train.live_images",
    "train.precision",
    "train.threads",
)  # no choice of a trial


def _refuse_untunable(params: Params, path: str, space: Range) -> None:
    """Raises ValueError for a path that a trial cannot choose, and for a range that the knob does not allow."""
    knobs = params.knobs()
    if path not in knobs:
        raise ValueError(f"tune.space names {path}, which is not a parameter")
    section = path.split(".")[0]
    if section not in ("model", "train") or path in NOT_TUNED:
        raise ValueError(
            f"tune.space names {path}; a trial chooses knobs of model and train, except {_listed(NOT_TUNED)}"
        )
    for value in _edges(path, space, knobs[path]):
        content = params.model_dump(mode="json", exclude_unset=True)
        _put(content, path, value)
        try:
            type(getattr(params, section)).model_validate(content[section])
        except ValidationError:
            allowed = _allowed(_schema_at(_keys(path)))
            raise ValueError(f"tune.space.{path} has {value!r}; allowed: {allowed}") from None


def _edges(path: str, space: Range, present: object) -> list[object]:
    """The values of a range that must be allowed for all of it to be."""
    if space.choices is not None:
        return list(space.choices)
    if isinstance(present, bool) or not isinstance(present, int | float):
        raise ValueError(f"tune.space.{path} has low and high; a knob that is {present!r} needs choices")
    bounds = [space.low, space.high]
    low, high, step = (Decimal(str(number or 0)) for number in (*bounds, space.step))  # 0.6 is no multiple of 0.05
    if step and (high - low) % step:
        raise ValueError(
            f"tune.space.{path}: from low {space.low:g}, steps of {space.step:g} do not lead to high {space.high:g}"
        )
    if isinstance(present, int):
        if not all(number is None or number.is_integer() for number in (*bounds, space.step)):
            raise ValueError(f"tune.space.{path} has a fraction; low, high and step are integers there")
        return [int(number) for number in bounds if number is not None]
    return list(bounds)


def _knobs(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | tuple):
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _knobs(inside, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def read_params(path: Path = PARAMS) -> Params:
    """The parameters in ``path``; a UserError of one line names the key, what was given and what is allowed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run this in the repository's root") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: `git restore {path}` brings the file back") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} has {len(content):,} bytes; allowed: {LARGEST_FILE:,}")
    return _validated(parse_yaml(content, path), path)


def with_values(content: str, knobs: Mapping[str, object]) -> str:
    """The text of a params.yaml with other values for some knobs; all else, comments included, stays as it is."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = LARGEST_FILE  # no line is broken
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    tree = yaml.load(content)
    for path, value in knobs.items():
        _put(tree, path, value)
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def parse_yaml(content: bytes, path: Path) -> object:
    """What a YAML file holds; a UserError of one line for what is none, or would take much more memory than it has."""
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
    """A few nested aliases stand for billions of values, and nesting costs the square of its depth."""
    depth = 0
    for event in yaml.parse(content):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent) or depth > DEEPEST_NESTING:
            line = event.start_mark.line + 1
            raise UserError(f"{path}: line {line}: aliases and more than {DEEPEST_NESTING} levels are not allowed")


def _validated(content: object, path: Path) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt knob is also a missing one: the spelling is what helps.
        errors.sort(key=lambda each: each["type"] != "extra_forbidden")
        raise UserError(f"{path}: {printable(_explained(errors[0]))}") from None


def _explained(error: ErrorDetails) -> str:
    *above, last = keys = error["loc"] or ("the file",)
    name, given = ".".join(str(key) for key in keys), _given(error["input"])
    match error["type"]:
        case "missing":
            return f"{name} is missing; allowed: {_allowed(_schema_at(keys))}"
        case "extra_forbidden":
            known = list(_schema_at(above)["properties"])
            close = difflib.get_close_matches(str(last), known, n=1)
            return (
                f"{name} is not a parameter; {f'did you mean {close[0]}?' if close else f'allowed: {_listed(known)}'}"
            )
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            return f"{name} is {given}: {message}" if error["loc"] else message
        case "invalid_key":
            return f"{name} is not a parameter; the names of knobs are text"
        case _:
            return f"{name} is {given}; allowed: {_allowed(_schema_at(keys))}"


def _given(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number of thousands of digits"  # which Python refuses to write


def _schema_at(keys: Sequence[int | str]) -> dict[str, Any]:
    """The JSON schema of the knob at ``keys``, that of the whole file for no keys."""
    schema = Params.model_json_schema()
    node, definitions = schema, schema["$defs"]
    for key in keys:
        inner = node.get("properties", {}).get(key) or node.get("items") or node.get("additionalProperties")
        node = _resolved(inner or node, definitions)
    return node


def _resolved(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        resolved: dict[str, Any] = definitions[node["$ref"].rsplit("/", 1)[1]]
        return resolved
    if "anyOf" in node:
        return node | {"anyOf": [_resolved(choice, definitions) for choice in node["anyOf"]]}
    return node


def _allowed(schema: dict[str, Any]) -> str:
    """What a knob's schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(schema["enum"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            bounds = [f"{sign} {schema[bound]}" for bound, sign in BOUNDS.items() if bound in schema]
            return f"{'an integer' if kind == 'integer' else 'a number'} {' and '.join(bounds)}".strip()
        case "array":
            most = f"to {schema['maxItems']}" if "maxItems" in schema else "or more"
            return f"a list of {schema['minItems']} {most}, each {_allowed(schema['items'])}"
        case "object" if "properties" in schema:
            return f"a section with the keys {_listed(schema['properties'])}"
        case kind:
            return {"boolean": "true | false", "string": "text", "null": "null", None: "a value"}.get(kind, "a section")


BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _one_line(text: str) -> str:
    return " ".join(text.split())
