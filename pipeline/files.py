"""The files that the stages pass to each other: their paths, and how they are read, written and hashed."""

import atexit
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipeline import private_folders, processes
from pipeline.errors import Fault, UserError

PREPARED = Path("data/prepared")
MODEL = Path("models/model.safetensors")
HISTORY = Path("reports/history.csv")
METRICS = Path("reports/metrics.json")
PREDICTIONS = Path("reports/predictions.csv")
PROMOTION = Path("reports/promotion.json")
CARD = Path("reports/model_card.md")
IMAGES = Path("reports/images.csv")
LABEL_CHECK = Path("reports/label_check.csv")
LABEL_PAGE = Path("reports/label_check.html")
SUMMARY = Path("reports/data_summary.json")
CONTACT_SHEETS = Path("reports/contact_sheets")
FIGURES = Path("reports/figures")
PLOTS = Path("reports/plots")
FIGURE_SOFTWARE, MAX_PNG_HEADER = "convtrack", 200  # what a figure's PNG names, in this many first bytes
UNFINISHED = ".tmp"


def root() -> Path:
    """The repository's root. DVC sets it as ``DVC_ROOT``, also where it runs a stage in a temporary copy.

    Raises UserError if this code is not in a repository but was installed by pip, whose folder must not be filled.
    """
    if given := os.environ.get("DVC_ROOT"):
        return Path(given).resolve()
    repository = Path(__file__).resolve().parents[1]
    if not (repository / "dvc.yaml").exists():
        raise UserError(f"{repository} is not a repository of this project: run the command in a clone of it")
    return repository


def own_figures(folder: Path = FIGURES) -> list[Path]:
    """The figures in ``folder`` that this project has drawn. A person may have other pictures beside them."""
    return [path for path in folder.glob("*.png") if path.is_file() and _is_own_figure(path)]


def _is_own_figure(path: Path) -> bool:
    with path.open("rb") as file:
        return f"Software\0{FIGURE_SOFTWARE}".encode() in file.read(MAX_PNG_HEADER)


def raw_folder() -> Path:
    """Where downloads are kept: beside the repository's other data, so that temporary copies find them too."""
    return root() / "data" / "raw"


def checkpoints_folder() -> Path:
    """Where checkpoints are saved, and updates that MLflow has not received yet; not an output of a stage."""
    return root() / "checkpoints"


def plain_name(text: str, otherwise: str) -> str:
    """``text`` in lower case letters from a to z, digits and hyphens; ``otherwise`` where nothing is left of it."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or otherwise


def open_input(path: Path, made_by: str) -> BufferedReader:
    """``path``, open for reading. A missing file is a UserError that names the stage to run."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `dvc repro {made_by}` first") from None


def read(path: Path, made_by: str) -> bytes:
    """The bytes of ``path``. A missing file is a UserError that names the stage to run."""
    with open_input(path, made_by) as file:
        return file.read()


def runs_in_dvc() -> bool:
    """Whether DVC runs this process as a stage."""
    return "DVC_STAGE" in os.environ


def write(path: Path, content: bytes) -> None:
    """Write ``path`` atomically and durably: see write_parts."""
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write ``path`` from its parts, and return the SHA-256 of the whole.

    Atomically and durably: neither a reader nor a power failure ever sees half a file. Raises Fault if it cannot be
    written; the older file is then kept.
    """
    digest = hashlib.sha256()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with unfinished.open("wb") as file:
            processes.mark(file.fileno())
            for part in parts:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
            unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise Fault(f"{path} cannot be written ({error.strerror}): {_remedy(error)}, then run again") from error
    finally:
        with suppress(OSError):  # the folder may be what cannot be written
            unfinished.unlink(missing_ok=True)
    return digest.hexdigest()


def check_writable(folder: Path) -> None:
    """Raises Fault if ``folder`` is not writable: better before an hour of training than after it."""
    _remove_leftovers(root())  # of a process that tried it before the folder existed
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not there.exists():
        raise Fault(
            f"{there} is a link to {there.readlink()}, which does not exist: make that folder, or remove the link"
        )
    probe = there / f".writable.{os.getpid()}{UNFINISHED}"
    write(probe, b"")
    probe.unlink()


def check_room(folder: Path, size: int) -> None:
    """Raises Fault if ``folder`` has less than ``size`` bytes free: for libraries that crash on a full disk."""
    if shutil.disk_usage(folder).free < size:
        raise Fault(f"{folder} has less than {size:,} bytes free: make room on that disk, then run again")


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote into this folder."""
    for left in folder.glob(f".*{UNFINISHED}"):
        number = left.name.removesuffix(UNFINISHED).rpartition(".")[2]
        with suppress(OSError):  # another process removes it too, or it is another user's
            if number.isdecimal() and processes.is_left_over(left, int(number)):
                left.unlink()


def use_own_temporary_folder() -> None:
    """Have this command put its temporary files into a folder of its own, and remove those of killed commands.

    Libraries make temporary folders too, whose names do not say whose they are. Does nothing where none can be made.
    """
    with suppress(OSError):
        for left in private_folders.temporary_folder().glob("convtrack-*-*"):
            is_ours = left.lstat().st_uid == os.getuid() and private_folders.OF_A_COMMAND.fullmatch(left.name)
            if is_ours and processes.is_left_over(left, int(left.name.split("-")[1])):
                shutil.rmtree(left, ignore_errors=True)
        tempfile.tempdir = tempfile.mkdtemp(prefix=f"convtrack-{os.getpid()}-")
        processes.mark(os.open(tempfile.tempdir, os.O_RDONLY))  # stays open until this process ends
        atexit.register(_remove_temporary_folder, Path(tempfile.tempdir), os.getpid())


def _remove_temporary_folder(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "make room on that disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "make the folder writable"
        case _:
            return "check that disk"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write ``content`` as JSON: the same content gives the same bytes."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``rows`` as CSV with their keys as the header: the same rows give the same bytes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(rows[0])
    table.writerows(row.values() for row in rows)
    write(path, text.getvalue().encode())


def read_table(path: Path, made_by: str) -> list[dict[str, str]]:
    """The rows of a CSV file, at least one. Errors name the stage to run."""
    content = read(path, made_by)
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Fault(f"{path} is damaged ({error}): run `dvc repro -f {made_by}`") from error
    if not rows:
        raise Fault(f"{path} is empty: run `dvc repro -f {made_by}`")
    return rows


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """The content of a JSON file. Errors name the stage to run."""
    content = read(path, made_by)
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise Fault(f"{path} is damaged ({error}): run `dvc repro -f {made_by}`") from error


def sha256(content: bytes) -> str:
    """The SHA-256 of ``content`` as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(file: BufferedReader) -> str:
    """The SHA-256 of an open file's content, from its beginning. The content is not read as a whole."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
