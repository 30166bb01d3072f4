"""convtrack: an experiment-tracked CNN workflow, from raw images to a registered model."""

from pipeline.startup import start_command

start_command()
