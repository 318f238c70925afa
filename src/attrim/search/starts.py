"""Where a ratio search begins: the same ratio everywhere, a global threshold, or what each group alone can stand."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.search.protocol import Start
from attrim.search.space import Point, Space

__all__ = ["STARTS", "sensitivity", "threshold", "uniform"]

STARTS = ("uniform", "global", "sensitivity")
"""Names of starts, as on the command line."""

_Begin = Generator[list[Point], list[float], Point]


def uniform(space: Space) -> _Begin:
    """The same kept fraction in every group. Evaluates nothing."""
    yield from ()
    return space.project(np.full(len(space), 0.5))


def threshold(scores: Scores) -> Start:
    """One threshold over the scores of all groups, found by bisection; for scores that are comparable between groups.

    Example:
        >>> optimise(neighbourhood(space, threshold(scores), 0), one_by_one(objective), space, evaluations=300)
    """

    def start(space: Space) -> _Begin:
        values = [np.sort(scores.values[space.cost.groups[g]].numpy().astype(np.float64)) for g in space.free]
        levels = np.unique(np.concatenate(values))
        low, high = 0, len(levels) - 1  # at the lowest level everything stays

        def ratios(level: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return np.array([1 - np.searchsorted(v, levels[level]) / len(v) for v in values])

        while low < high:
            middle = (low + high) // 2
            if space.limits.slack(space.at(ratios(middle), 0.0)) >= 0:
                high = middle
            else:
                low = middle + 1
        yield from ()
        return space.project(ratios(high))

    return start


def sensitivity(keep: float = 0.5, strength: float = 0.5) -> Start:
    """Groups keep the more, the more is lost when they alone are cut: one evaluation per group.

    Args:
        keep: kept fraction of the group that is probed, in (0, 1).
        strength: ratios range over this width around their middle, from the least to the most sensitive group.

    Raises:
        InputError: ``keep`` or ``strength`` outside (0, 1).

    Source: layer-wise sensitivity as in Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.2; ratios
    by the rank of the sensitivity are ours.
    """
    if not 0 < keep < 1 or not 0 < strength < 1:
        raise InputError(f"sensitivity: expected keep and strength in (0, 1), found {keep!r} and {strength!r}.")

    def start(space: Space) -> _Begin:
        probes = []
        for i in range(len(space)):
            ratios = np.ones(len(space))
            ratios[i] = keep
            probes.append(tuple(space.at(ratios, 0.0).tolist()))
        values = np.array((yield probes))
        lost = -np.where(np.isfinite(values), values, -np.finfo(np.float64).max)
        places = np.empty(len(space))
        places[np.argsort(lost, kind="stable")] = np.linspace(-0.5, 0.5, len(space)) if len(space) > 1 else 0.0
        return space.project(0.5 + strength * places)

    return start
