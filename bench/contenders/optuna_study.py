"""A plain Optuna study around the usual loop, as in Optuna's own PyTorch example.

After the file of images come the epochs of a trial and, as JSON, the values of the trials: so that both studies train
the same networks, however they choose.
"""

import json
import sys

import optuna
from optuna.trial import Trial

from bench.contenders import reporting, usual
from bench.contenders.dataloader_loop import train_and_validate


def main() -> None:
    """Run the study, one trial after the other."""
    epochs, values = int(sys.argv[2]), json.loads(sys.argv[3])
    train, validation = usual.loaders(workers=0)

    def objective(trial: Trial) -> float:
        filters = [trial.suggest_int(f"model.filters.{block}", 8, 128, step=8) for block in (0, 1)]
        model = usual.network(filters, trial.suggest_float("model.dropout", 0.0, 0.6))
        adam = usual.optimizer(model.parameters())
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
        reporting.report(seconds=trial.duration.total_seconds(), accuracy=trial.values[0])
    reporting.report_memory()


if __name__ == "__main__":
    main()
