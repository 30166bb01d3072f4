"""Prints the results of the last `dvc repro`: the data set that was used, the test metrics, where to look.

Exits 3 where the store lacks some of them: then `make repro` runs the stages again that log them.
"""

import sys

from pipeline import dvc_files, files
from pipeline.data.splits import TEST, TRAIN, read_dataset
from pipeline.errors import Fault, counted, run_command, without_password
from pipeline.model import metrics
from pipeline.tracking import registry, store

LACKING = 3  # the exit code where the store lacks results


def main() -> None:
    """Read what the stages wrote and print one line per fact."""
    dataset = read_dataset()
    scores = files.read_json(files.METRICS, made_by="evaluate")
    test, count = scores["test"], dataset.splits[TEST].count
    errors = counted(test["error_count"], "error")
    facts = {
        "data set": f"{dataset.label} ({dataset.splits[TRAIN].count:,} training images)",
        "test accuracy": f"{test['accuracy']:.2%} ({errors} in {counted(count, 'image')})",
        "test loss": f"{test['loss']:.4f}",
        "by class": metrics.beside_accuracy(test),
        "parameters": f"{scores['parameters']:,}",
        "figures": f"{files.FIGURES}/",
        "MLflow": "make ui     then open http://127.0.0.1:5000",
    }
    width = max(map(len, facts)) + 2
    print("\n".join(f"{name:<{width}}{fact}" for name, fact in facts.items()))
    try:
        store.connect()
        model = dvc_files.evaluated_model()
        lacking = registry.lacking(model) if model else None
    except Fault as fault:  # what was trained is here all the same
        _warn(str(fault))
    else:
        if lacking:
            _warn(lacking)
            sys.exit(LACKING)


def _warn(text: str) -> None:
    print(f"warning: {without_password(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
