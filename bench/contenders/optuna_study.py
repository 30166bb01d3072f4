"""A plain Optuna study around the usual loop, as in Optuna's own PyTorch example.

    python -m bench.contenders.optuna_study IMAGES EPOCHS VALUES

VALUES is a JSON list of the trials' values, so that all studies train the same networks. Prints a line for each trial.
"""

import json
import sys

import optuna
from optuna.trial import Trial

from bench.contenders.dataloader_loop import loaders, network, optimizer, train_and_validate


def main() -> None:
    """Run the study, one trial after the other."""
    epochs, values = int(sys.argv[2]), json.loads(sys.argv[3])
    train, validation = loaders(workers=0)

    def objective(trial: Trial) -> float:
        filters = [trial.suggest_int(f"model.filters.{block}", 8, 128, step=8) for block in (0, 1)]
        model = network(filters, trial.suggest_float("model.dropout", 0.0, 0.6))
        adam = optimizer(model.parameters())
        accuracy = 0.0
        for epoch in range(epochs):
            _, accuracy = train_and_validate(model, adam, train, validation)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return accuracy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=10))
    for each in values:
        study.enqueue_trial(each)
    study.optimize(objective, n_trials=len(values))
    for trial in study.trials:
        assert trial.duration is not None
        print(json.dumps({"seconds": trial.duration.total_seconds(), "accuracy": trial.values[0]}))


if __name__ == "__main__":
    main()
