"""What each command loads when it first needs it. Imported before tests/forked.py forks a command, it is loaded once.

None of it starts a thread, which would be missing after a fork.
"""

import git
import mlflow.pyfunc.model
import mlflow.pytorch
import mlxtend.data
import opentelemetry.sdk.trace
import torch._dynamo
import torch._functorch.partitioners
import torch.export._trace
from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches
from numba.core.registry import cpu_target

from pipeline.model import cpu_kernels

cpu_kernels._allow_512_bit_vectors()  # Numba reads this setting once, when its target is made
cpu_target.target_context.refresh()
warn_dependency_requirement_mismatches(["mlflow"])  # reads the files of every installed package, once

__all__ = ["git", "mlflow", "mlxtend", "opentelemetry", "torch"]
