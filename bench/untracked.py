"""Stage `train` with nobody listening: what it costs without MLflow. For bench/speed.py.

Run in a workspace with params.yaml and the prepared images, as `python -m pipeline.train` is.
"""

import sys
from contextlib import nullcontext
from types import ModuleType

from pipeline.errors import run_command


def main() -> None:
    """Run the stage with a tracking module that does nothing; mlflow is not even imported."""
    silent = ModuleType("pipeline.tracking.runs")
    for name in ("connect", "log_epoch", "describe_model"):
        setattr(silent, name, lambda *_: None)
    silent.__dict__["training_run"] = lambda *_: nullcontext()
    sys.modules["pipeline.tracking.runs"] = silent
    from pipeline import train

    train.main()
    assert "mlflow" not in sys.modules


if __name__ == "__main__":
    run_command(main)
