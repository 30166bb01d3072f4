"""Prints the results of the last `dvc repro`: the data set that was used, the test metrics, where to look."""

from pipeline import files
from pipeline.data.splits import TEST, TRAIN, read_dataset
from pipeline.errors import run_command


def main() -> None:
    """Read what the stages wrote and print one line per fact."""
    dataset = read_dataset()
    metrics = files.read_json(files.METRICS, made_by="evaluate")
    test, count = metrics["test"], dataset.splits[TEST].count
    facts = {
        "data set": f"{dataset.label} ({dataset.splits[TRAIN].count:,} training images)",
        "test accuracy": f"{test['accuracy']:.2%} ({test['error_count']} errors in {count:,} images)",
        "test loss": f"{test['loss']:.4f}",
        "parameters": f"{metrics['parameters']:,}",
        "figures": f"{files.FIGURES}/",
        "MLflow": "make ui     then open http://127.0.0.1:5000",
    }
    width = max(map(len, facts)) + 2
    print("\n".join(f"{name:<{width}}{fact}" for name, fact in facts.items()))


if __name__ == "__main__":
    run_command(main)
