"""Tables that a command fills when it first needs them. Filled before tests/forked.py forks one, it is done once.

None of it starts a thread, which would be missing after a fork.
"""

from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches
from numba.core.registry import cpu_target

from pipeline.model import kernel_cache

kernel_cache.allow_512_bit_vectors()  # Numba reads this setting once, when its target is made
cpu_target.target_context.refresh()
warn_dependency_requirement_mismatches(["mlflow"])  # reads the files of every installed package
