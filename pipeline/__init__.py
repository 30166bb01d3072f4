"""convtrack: an experiment-tracked CNN workflow, from raw images to a registered model."""

import gc

# Python looks for garbage after every 700 new objects. The libraries of a stage make half a million while they are
# imported and none of them is garbage: looking for it took a third of the time that a stage needs to start.
gc.set_threshold(100_000, 50, 100)
