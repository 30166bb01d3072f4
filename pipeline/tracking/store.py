"""Errors of the tracking store, as a line for the person who reads it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import Fault, without_password

# The last one from the disk with the artifacts, and from a server that takes no file.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)


@contextmanager
def store_faults() -> Iterator[None]:
    """Errors of the tracking store leave as a Fault of one line. Also a decorator."""
    try:
        yield
    except STORE_ERRORS as error:
        raise Fault(f"the tracking store {address()} failed: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says first, without a password."""
    # Before some errors SQLAlchemy tells what it was about to do.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of")]
    remedy = ": make room on that disk" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
    return without_password(lines[0] if lines else type(error).__name__) + remedy


def address() -> str:
    """That of the tracking store, without a password."""
    return without_password(mlflow.get_tracking_uri())
