"""Candidates evaluated by several processes: each takes what is free, and all wait for the whole batch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from attrim.search.protocol import Evaluate
from attrim.search.space import Point
from attrim.search.trials import Claim, Trials

__all__ = ["Values", "shared"]

Values = Callable[[Point], tuple[float, bool]]
"""Value of a candidate, and whether it was judged whole."""

_SHORTEST, _LONGEST = 0.01, 0.5
"""Seconds between two looks at what the others do."""


def shared(
    trials: Trials,
    value: Values,
    *,
    begin: Callable[[Sequence[Point]], None] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Evaluate:
    """Evaluate batches together with all processes that carry out the same search in the same study.

    All of them play the same search: what it proposes follows from its seed and the values, and those are in the study. So
    any process may come and go, and no one leads. Values that are there already are not computed again.

    Args:
        trials: the study.
        value: the objective.
        begin: called before this process evaluates its first candidate of a batch, with all that are left.
        tick: called at every look, with the number of finished trials; it may raise to end the search.

    Example:
        >>> optimise(proposals, shared(trials, value), space, evaluations=300)
    """

    def evaluate(points: Sequence[Point]) -> list[float]:
        order = random.sample(range(len(points)), len(points))  # so that processes seldom want the same one
        pause, begun = _SHORTEST, False
        while True:
            trials.refresh()
            if tick is not None:
                tick(len(trials.values))
            values = trials.values
            left = [points[i] for i in order if points[i] not in values]
            if not left:
                return [values[point] for point in points]
            free = [point for point in left if point not in trials.running]
            claim = trials.claim(free[0]) if free else None
            if claim is not None:
                if begin is not None and not begun:
                    begin(left)
                begun = True
                _carry_out(trials, claim, value)
                pause = _SHORTEST
            elif not free and not trials.bury():
                time.sleep(pause)
                pause = min(_LONGEST, 1.5 * pause)

    return evaluate


def _carry_out(trials: Trials, claim: Claim, value: Values) -> None:
    begin = time.monotonic()
    try:
        with _beating(trials, claim):
            found, complete = value(claim.point)
    except BaseException as error:
        trials.give_up(claim, f"{type(error).__name__}: {error}"[:500])
        raise
    trials.finish(
        claim, float("-inf") if found != found else found, seconds=round(time.monotonic() - begin, 4), complete=complete
    )


@contextmanager
def _beating(trials: Trials, claim: Claim) -> Iterator[None]:
    """Inside, a thread gives signs of life."""
    over = threading.Event()

    def beat() -> None:
        number = 1
        while not over.wait(trials.heartbeat) and trials.beat(claim, number):
            number += 1

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
