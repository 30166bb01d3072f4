"""What was read from files before, by the SHA-256 of their content. Decoding them again would take minutes."""

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import Fault

TABLE = "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, content BLOB NOT NULL)"
MAX_KEYS = 500  # in one query


class Cache:
    """Bytes by keys, in an SQLite file that may be deleted at any time. For one thread, and a ``with``."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; a damaged one is begun anew. Raises Fault where it cannot be written."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._database = _opened(path)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # not damaged
                    raise
                path.unlink()
                self._database = _opened(path)
        except (OSError, sqlite3.Error) as error:
            raise self._fault(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(sqlite3.Error):  # what could not be kept is decoded again
            self._database.close()

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """What is known of these keys."""
        wanted, found = list(keys), dict[str, bytes]()
        try:
            for start in range(0, len(wanted), MAX_KEYS):
                some = wanted[start : start + MAX_KEYS]
                marks = ", ".join("?" * len(some))
                found |= self._database.execute(f"SELECT key, content FROM results WHERE key IN ({marks})", some)
        except sqlite3.OperationalError as error:
            raise self._fault(error) from error
        except sqlite3.DatabaseError:  # damaged
            self._begin_anew()
        return found

    def put(self, results: Mapping[str, bytes]) -> None:
        """Keep these. Raises Fault where the disk is full."""
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", results.items())
        except sqlite3.OperationalError as error:
            raise self._fault(error) from error
        except sqlite3.DatabaseError:  # damaged
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._database.close()
        self._path.unlink()
        self._database = _opened(self._path)

    def _fault(self, error: Exception) -> Fault:
        return Fault(f"{self._path} cannot be used ({error}): make room on that disk, or delete it, then run again")


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60)
    with closing(database.cursor()) as cursor:
        cursor.execute("PRAGMA page_size = 16384")  # bytes, of a new file: an image is then in few pages
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute(TABLE)
    return database
