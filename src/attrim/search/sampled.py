"""Optuna's samplers as searches: TPE, CMA-ES, and NSGA-II for a front of value against MACs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from attrim.search.protocol import Proposals, Start
from attrim.search.space import FloatArray, Point, Space
from attrim.search.storage import import_optuna, quiet

__all__ = ["cmaes", "nsga2", "tpe"]

_BATCH = 5
_POPULATION = 20
_LEAST = 0.05
"""Smallest ratio that is sampled."""


def tpe(space: Space, start: Start, seed: int) -> Proposals:
    """Tree-structured Parzen estimator; five candidates at a time, pretending that those under way are bad.

    Ratios are sampled, and projected on the budget. The sampler's own study lives in memory and is played again when a
    search goes on, like every other search.

    Source: Bergstra et al., NeurIPS 2011; `optuna.samplers.TPESampler`, multivariate.
    """

    def sampler(optuna: Any) -> Any:
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    return _sampled(space, start, sampler, lambda space: _BATCH)


def cmaes(space: Space, start: Start, seed: int) -> Proposals:
    """Covariance matrix adaptation, one population at a time.

    Source: Hansen & Ostermeier, Evolutionary Computation 9(2), 2001; `optuna.samplers.CmaEsSampler`.
    """

    def size(space: Space) -> int:
        return 4 + int(3 * math.log(max(2, len(space))))

    def sampler(optuna: Any) -> Any:
        return optuna.samplers.CmaEsSampler(seed=seed, popsize=size(space), warn_independent_sampling=False)

    return _sampled(space, start, sampler, size)


def nsga2(space: Space, start: Start, seed: int) -> Proposals:
    """Non-dominated sorting: value and MACs both count, and candidates lie above and below the budget.

    The best candidate within the budget is the result; the trials hold the whole front.

    Source: Deb et al., IEEE Transactions on Evolutionary Computation 6(2), 2002; `optuna.samplers.NSGAIISampler`.
    """

    def sampler(optuna: Any) -> Any:
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)

    return _sampled(space, start, sampler, lambda space: _POPULATION, front=True)


def _sampled(
    space: Space, start: Start, sampler: Callable[[Any], Any], batch: Callable[[Space], int], front: bool = False
) -> Proposals:
    optuna = import_optuna("searching with Optuna's samplers")
    names = [str(g) for g in space.free.tolist()]
    distributions = {name: optuna.distributions.FloatDistribution(_LEAST, 1.0) for name in names}
    directions = ["maximize", "minimize"] if front else ["maximize"]
    with quiet():
        study = optuna.create_study(directions=directions, sampler=sampler(optuna))
    here = yield from start(space)
    ratios = np.clip(space.ratios(here), _LEAST, 1)
    study.enqueue_trial(dict(zip(names, ratios.tolist(), strict=True)))
    size = 1
    while True:
        with quiet():
            trials = [study.ask(distributions) for _ in range(size)]
        asked = [np.array([trial.params[name] for name in names]) for trial in trials]
        points = [_within(space, ratios, front) for ratios in asked]
        if size == 1:
            points = [here]
        for trial, point, value in zip(trials, points, (yield points), strict=True):
            _tell(optuna, study, trial, [value, _macs(space, point)] if front else [value])
        size = batch(space)


def _within(space: Space, ratios: FloatArray, front: bool) -> Point:
    if not front:
        return space.project(ratios)
    kept: list[int] = space.at(ratios, 0.0).tolist()
    return tuple(kept)


def _macs(space: Space, point: Point) -> float:
    return space.cost.macs(list(point)) / max(1, space.cost.macs())


def _tell(optuna: Any, study: Any, trial: Any, values: list[float]) -> None:
    with quiet():
        if all(map(math.isfinite, values)):
            study.tell(trial, values)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
