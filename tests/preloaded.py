"""Tables that a command fills when it first needs them. Filled before tests/forked.py forks one, it is done once.

None of it starts a thread, which would be missing after a fork.
"""

from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches

from pipeline.model import kernel_cache

kernel_cache.target_context().refresh()
warn_dependency_requirement_mismatches(["mlflow"])  # reads the files of every installed package
