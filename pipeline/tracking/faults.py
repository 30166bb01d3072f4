"""Errors of the tracking store, as a line for the person who reads it."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import Fault, without_password

STORE_ERRORS = (MlflowException, SQLAlchemyError)


@contextmanager
def store_faults() -> Iterator[None]:
    """Errors of the tracking store leave as a Fault of one line. Also a decorator."""
    try:
        yield
    except STORE_ERRORS as error:
        raise Fault(f"the tracking store {address()} failed: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says first, without a password."""
    return without_password(str(error).splitlines()[0] if str(error) else type(error).__name__)


def address() -> str:
    """That of the tracking store, without a password."""
    return without_password(mlflow.get_tracking_uri())
