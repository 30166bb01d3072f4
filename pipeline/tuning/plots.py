"""Figures of the study: its history, accuracy against size, and Optuna's figures of the tuned parameters."""

import warnings
from collections.abc import Callable
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from optuna.visualization import matplotlib as drawings

from pipeline import files
from pipeline.figures import curves
from pipeline.figures.canvas import as_png
from pipeline.tracking.studies import ERRORS, TrialRecord
from pipeline.tuning.study import Study

DRAWINGS: dict[str, Callable[..., object]] = {
    "importances": drawings.plot_param_importances,
    "slice": drawings.plot_slice,
    "parallel_coordinates": drawings.plot_parallel_coordinate,
}
MIN_TRIALS = 2  # complete ones; a single trial does not show which parameter matters


def write(study: Study, folder: Path) -> list[Path]:
    """Write the figures for which there are enough complete trials; returns their paths."""
    ended = study.ended()
    complete = [trial for trial in ended if trial.status == "complete"]
    pictures = {"history": as_png(_history(study, ended)), "accuracy_against_size": as_png(_front(study, complete))}
    if len(complete) >= MIN_TRIALS:
        pictures |= {name: _drawn(draw, study) for name, draw in DRAWINGS.items()}
    for name, picture in pictures.items():
        files.write(folder / f"{name}.png", picture)
    return [folder / f"{name}.png" for name in pictures]


def _history(study: Study, ended: list[TrialRecord]) -> Figure:
    seen = [trial for trial in ended if trial.status != "failed" and trial.history]
    return curves.study_history(
        [trial.number for trial in seen],
        [trial.history[-1][study.score] for trial in seen],
        [trial.status == "pruned" for trial in seen],
        study.score_in_words,
    )


def _front(study: Study, complete: list[TrialRecord]) -> Figure:
    return curves.accuracy_against_size(
        [trial.sizes["parameters"] for trial in complete],
        [trial.validation_score for trial in complete],
        study.score_in_words,
    )


def _drawn(draw: Callable[..., object], study: Study) -> bytes:
    with warnings.catch_warnings(), pyplot.rc_context():  # Optuna changes the style of all later figures
        warnings.simplefilter("ignore")  # it is experimental, and explains that lower is better
        draw(study.optuna, target=_error, target_name=ERRORS[study.params.evaluate.metric].replace("_", " "))
        picture = as_png(pyplot.gcf(), tight=True)
        pyplot.close("all")
    return picture


def _error(trial: FrozenTrial) -> float:
    return float(trial.values[0])
