"""Notices that what a stage has read is changed while it runs."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline import dvc_files, files
from pipeline.errors import UserError, printable
from pipeline.params import differences, flat, read_params

Stat = tuple[int, int]  # size in bytes, and the time of the last change in nanoseconds


class StageInputs:
    """What a stage depends on, as it is when the stage begins: its parameters, its code and its files.

    DVC notes in dvc.lock what is there when the stage has ended. If that is not what the stage has read, dvc.lock gives
    its outputs an origin that they do not have, and DVC finds them up to date.
    """

    def __init__(self, stage: str) -> None:
        if files.runs_in_dvc():
            dvc_files.keep_lock()
        self._stage, self._definition = stage, dvc_files.definition(stage)
        self._params = self._params_now()
        self._stats, self._digests = _stats(self._files_now()), dvc_files.digests(self._files_now())
        self._pictures = self._pictures_now()

    def check_unchanged(self) -> None:
        """Raises UserError, naming what has changed since then. After that DVC notes nothing for the stage."""
        changes = differences(self._params, self._params_now())
        found = self._files_now()
        if _stats(found) != self._stats:
            now = dvc_files.digests(found)
            names = sorted({*now, *self._digests})
            changes += [f"{name} has changed" for name in names if now.get(name) != self._digests.get(name)]
        if changed := [name for name, _ in sorted(self._pictures_now().items() ^ self._pictures.items())]:
            changes.append(f"{printable(changed[0])} has changed")
        if changes:
            raise UserError(
                f"`{self._stage}` began with other inputs than are here now ({'; '.join(changes)}): "
                "undo that or keep it, then `dvc repro`"
            )

    def _params_now(self) -> dict[str, object]:
        """The parameters that the stage depends on, by their dotted paths."""
        names = tuple(f"{name}." for name in self._definition.get("params", []))
        values = flat(read_params().model_dump(mode="json"))
        return {path: value for path, value in values.items() if f"{path}.".startswith(names)}

    def _files_now(self) -> dict[str, Path]:
        """The files of code and data that the stage depends on and that exist, by their names in messages."""
        others = [dep for dep in self._definition["deps"] if not dep.startswith(dvc_files.CODE)]
        data = {dep: Path(dep) for dep in others if dep != dvc_files.OWN_PICTURES}
        return {name: path for name, path in (dvc_files.code_files(self._definition) | data).items() if path.is_file()}

    def _pictures_now(self) -> dict[str, Stat]:
        """A person's pictures, in a folder or a .zip. They are too large to be hashed once more."""
        if dvc_files.OWN_PICTURES not in self._definition["deps"]:
            return {}
        path = Path(read_params().data.path)
        if path.is_file():
            return _stats({str(path): path})
        found, waiting = dict[str, Stat](), [str(path)]
        while waiting:
            with suppress(OSError), os.scandir(waiting.pop()) as entries:  # objects of pathlib take three times as long
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file():
                        found[entry.path] = _stat(entry.stat())
        return found


def _stats(paths: Mapping[str, Path]) -> dict[str, Stat]:
    return {name: _stat(path.stat()) for name, path in paths.items()}


def _stat(facts: os.stat_result) -> Stat:
    return facts.st_size, facts.st_mtime_ns
