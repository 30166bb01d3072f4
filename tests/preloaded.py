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
from mlflow.utils import requirements_utils
from numba.core.registry import cpu_target

from pipeline.model import cpu_kernels

cpu_kernels._allow_512_bit_vectors()  # Numba reads this setting once, when its target is made
cpu_target.target_context.refresh()
requirements_utils._init_packages_to_modules_map()  # type: ignore[no-untyped-call]  # reads the files of every installed package

__all__ = ["git", "mlflow", "mlxtend", "opentelemetry", "torch"]
