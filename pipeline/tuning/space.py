"""What a trial may choose: the ranges of params.yaml as Optuna's distributions."""

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.params import Params, Range

Space = dict[str, BaseDistribution]


def space_of(params: Params) -> Space:
    """A distribution for each knob of ``tune.space``, which params.yaml has checked against the knob."""
    present = params.by_path()
    return {path: _distribution(params.tune.space[path], present[path]) for path in sorted(params.tune.space)}


def _distribution(space: Range, present: object) -> BaseDistribution:
    if space.choices is not None:
        return CategoricalDistribution(space.choices)
    assert space.low is not None
    assert space.high is not None
    if isinstance(present, int):
        return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
    return FloatDistribution(space.low, space.high, log=space.log, step=space.step)


def present_values(params: Params, space: Space) -> dict[str, object] | None:
    """The tuned knobs as params.yaml has them; None where one of them lies outside its range."""
    knobs = params.by_path()
    values = {path: knobs[path] for path in space}
    return values if all(_contains(space[path], value) for path, value in values.items()) else None


def _contains(distribution: BaseDistribution, value: object) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:
        return False
