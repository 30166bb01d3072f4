"""The study's storage, and the message when it fails."""

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from pipeline.errors import Fault
from pipeline.tuning.storage import storage_faults


def test_the_first_error_is_reported() -> None:
    with pytest.raises(Fault, match=r"^the study's storage failed: the table is locked$"), storage_faults():
        locked = ValueError("the table is locked")
        try:
            raise OperationalError("SELECT 1", {}, locked) from locked
        except OperationalError as error:
            raise StorageInternalError("an error of the storage") from error


def test_an_unrelated_handled_exception_is_not_reported() -> None:
    def ask_the_storage() -> None:
        raise StorageInternalError("it is gone")

    with pytest.raises(Fault, match=r"^the study's storage failed: it is gone$"), storage_faults():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:  # the trials at work are given back then
            ask_the_storage()
