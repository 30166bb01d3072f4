"""Stage `train` with or without MLflow: the most memory it took. For bench/stages.py.

    python -m bench.train_stage tracked | untracked

Runs in a workspace with params.yaml and the prepared images, as `python -m pipeline.train` does.
"""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

from bench.contenders import reporting
from pipeline.errors import run_command


def main() -> None:
    """Run the stage; untracked with tracking modules that do nothing, so that mlflow is not even imported."""
    if sys.argv[1] == "untracked":
        silent = ModuleType("pipeline.tracking.runs")
        ignored = dict.fromkeys(("log_epoch", "log_images", "describe_model"), lambda *_: None)
        run = SimpleNamespace(run_id="", **ignored)
        silent.__dict__.update({"close_stale_runs": lambda: None, "TrainingRun": object})
        silent.__dict__["training_run"] = lambda *_, **__: nullcontext(run)
        unreached = ModuleType("pipeline.tracking.store")
        unreached.__dict__["connect"] = lambda: None
        blind = ModuleType("pipeline.explain.live_images")
        blind.__dict__["LiveImages"] = lambda *_: SimpleNamespace(now=dict, after_epoch=dict)
        sys.modules |= {"pipeline.tracking.runs": silent, "pipeline.tracking.store": unreached}
        sys.modules["pipeline.explain.live_images"] = blind
    from pipeline import train

    train.main()
    assert ("mlflow" in sys.modules) == (sys.argv[1] == "tracked")
    reporting.report_memory()


if __name__ == "__main__":
    run_command(main)
