"""What a tracking store raises, as one line."""

import errno

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import without_password

# OSError comes from the disk with the artifacts, and from a server that refuses a file.
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)


def one_line(error: BaseException) -> str:
    """The first line of an error's message, without a password."""
    # SQLAlchemy prefixes some errors with the failed operation.
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("(raised as a result of")]
    remedy = ": make room on that disk" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
    return without_password(lines[0] if lines else type(error).__name__) + remedy
