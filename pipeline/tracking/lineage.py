"""Where a model comes from: the tags that say so, and whether this checkout would train the same model again."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipeline import dvc_files, machine, params

CODE, RECIPE = "code", "recipe"
PARAMS_SHA256, DATA_SHA256 = "params.sha256", "data.sha256"


def code() -> str:
    """JSON: the code files that the stage `train` depends on, and the start of the SHA-256 of each.

    Unlike a commit it includes uncommitted changes.
    """
    return json.dumps({path: digest[:16] for path, digest in dvc_files.code_of("train").items()})


def code_of(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """The code that trained the model with these tags, as ``code`` gives it; None where it is unknown."""
    try:
        return json_object(tags[CODE])
    except (KeyError, ValueError, RecursionError):
        return None


def json_object(text: str) -> dict[str, Any]:
    """The content of a JSON object. Raises ValueError for other text."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def differences(
    tags: Mapping[str, str], recipe: Mapping[str, object], data_sha256: str | None
) -> Iterator[tuple[str, str]]:
    """What differs between this checkout and the one that trained the model with these tags: its kind, and a message.

    ``recipe`` is that of params.yaml, ``data_sha256`` that of the prepared data, None where there are none. Raises
    ValueError where RECIPE is not a JSON object.
    """
    trained_with = json_object(tags[RECIPE])
    comparable = {path: value for path, value in trained_with.items() if not path.startswith("data.")}  # once in it
    for difference in params.differences(comparable, recipe):
        yield "params", difference
    if data_sha256 is None:
        yield "data", "none are prepared here yet: dvc repro prepare"
    elif data_sha256 != tags[DATA_SHA256]:
        yield "data", f"SHA-256 was {tags[DATA_SHA256][:12]}..., here it is {data_sha256[:12]}..."
    before_code, code_here = code_of(tags) or {}, json.loads(code())
    for path in sorted(before_code):
        if code_here.get(path) != before_code[path]:
            yield "code", f"{path} has changed"


def other_machine(tags: Mapping[str, str], device: torch.device) -> list[str]:
    """What may change the last bits if the model is trained again here, on ``device``."""
    here = machine.environment_tags(device)
    return [
        f"{key} was {tags[key]}, here it is {here.get(key)}"
        for key in machine.FACTS
        if key in tags and tags[key] != here.get(key)
    ]
