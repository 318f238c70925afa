"""The small protocol of all ratio searches: they propose batches of candidates and are sent their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from attrim.errors import InputError
from attrim.search.space import Point, Space

__all__ = ["Evaluate", "Found", "Objective", "Proposals", "Search", "Start", "Trial", "one_by_one", "optimise"]

Objective = Callable[[Point], float]
"""Kept counts -> value; larger is better. NaN counts as hopeless."""

Evaluate = Callable[[Sequence[Point]], list[float]]
"""Values of new, distinct candidates, in their order."""

Proposals = Generator[list[Point], list[float], None]
"""Yields candidates, is sent their values; may repeat itself (a repeated candidate costs nothing)."""

Start = Callable[[Space], Generator[list[Point], list[float], Point]]
"""Finds the candidate where a search begins; may have candidates evaluated on the way, also ones above the budget."""

_STALE = 20
"""Batches without anything new after which a search has seen its space."""


class Search(Protocol):
    """A search: all that it decides follows from its seed and the values that it is sent."""

    def __call__(self, space: Space, start: Start, seed: int) -> Proposals:
        """Begin a search."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated candidate; ``feasible`` says whether it keeps the budget (probes of a start may not)."""

    kept: Point
    value: float
    feasible: bool = True


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: the best candidate within the budget, its value, and every trial in order."""

    best: Point
    value: float
    trials: tuple[Trial, ...]

    @property
    def curve(self) -> list[float]:
        """Best value within the budget after each trial; ``-inf`` before the first."""
        best, line = -math.inf, []
        for trial in self.trials:
            best = max(best, trial.value) if trial.feasible else best
            line.append(best)
        return line


def one_by_one(objective: Objective) -> Evaluate:
    """An objective as :data:`Evaluate`."""
    return lambda points: [objective(point) for point in points]


def optimise(
    proposals: Proposals,
    evaluate: Evaluate,
    space: Space,
    *,
    evaluations: int,
    on_trial: Callable[[int, Trial, Trial | None], None] | None = None,
) -> Found:
    """Carry a search out: at most ``evaluations`` different candidates are evaluated, none twice.

    The same proposals, values and number of evaluations give the same result, so a search goes on after an
    interruption by being played again with the values that are known already.

    Args:
        proposals: the search.
        evaluate: values of new candidates; see :func:`one_by_one`.
        space: says which candidates keep the budget; only those can be the best. The earlier one wins a tie.
        evaluations: budget of different candidates, >= 1.
        on_trial: called with the number of trials so far, the new trial and the best one.

    Raises:
        InputError: ``evaluations`` is not a positive int, or no candidate within the budget was evaluated.

    Example:
        >>> found = optimise(neighbourhood(space, uniform, 0), one_by_one(objective), space, evaluations=300)
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise InputError(f"evaluations: expected an int >= 1, found {evaluations!r}.")
    known: dict[Point, float] = {}
    trials: list[Trial] = []
    best: Trial | None = None
    stale = 0
    try:
        batch = next(proposals)
        while True:
            new = [point for point in dict.fromkeys(batch) if point not in known][: evaluations - len(known)]
            for point, value in zip(new, evaluate(new) if new else [], strict=True):
                trial = Trial(point, -math.inf if math.isnan(value) else float(value), space.fits(point))
                known[point] = trial.value
                trials.append(trial)
                if trial.feasible and (best is None or trial.value > best.value):
                    best = trial
                if on_trial is not None:
                    on_trial(len(trials), trial, best)
            stale = 0 if new else stale + 1
            if len(known) >= evaluations or stale >= _STALE:
                break
            batch = proposals.send([known[point] for point in batch])
    except StopIteration:
        pass
    finally:
        proposals.close()
    if best is None:
        raise InputError(
            f"none of the {len(trials)} evaluated candidates keeps the budget: the start took them all. Raise evaluations."
        )
    return Found(best.kept, best.value, tuple(trials))
