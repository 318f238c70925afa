"""Candidates evaluated by several processes: each takes what is free, and all wait for the whole batch."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from attrim.search.protocol import Evaluate
from attrim.search.space import Point
from attrim.search.trials import Claim, Judgement, Trials

__all__ = ["shared"]

_SHORTEST, _LONGEST = 0.01, 0.5
"""Seconds between two looks at what the others do."""


def shared(
    trials: Trials,
    judge: Callable[[Point], Judgement],
    *,
    expect: Callable[[Sequence[Point]], Sequence[Point]] | None = None,
    learn: Callable[[Mapping[Point, Judgement]], None] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Evaluate:
    """Evaluate batches together with all processes that carry out the same search in the same study.

    All of them play the same search: what it proposes follows from its seed and the values, and those are in the study. So
    any process may come and go, and no one leads. Values that are there already are not computed again.

    Args:
        trials: the study.
        judge: the objective.
        expect: called before the first candidate of a batch that has to be judged, with all of them that are not known;
            returns them in the order in which it would judge them.
        learn: called after each batch with what is known about its candidates, in their order, whoever judged them.
        tick: called at every look, with the number of finished trials; it may raise to end the search.

    Example:
        >>> optimise(proposals, shared(trials, judge), space, evaluations=300)
    """

    def evaluate(points: Sequence[Point]) -> list[float]:
        order = random.sample(points, len(points))  # so that processes seldom want the same one
        pause, expected = _SHORTEST, False
        while True:
            trials.refresh()
            if tick is not None:
                tick(len(trials.known))
            left = [point for point in order if point not in trials.known]
            if not left:
                break
            free = [point for point in left if point not in trials.running]
            if free and expect is not None and not expected:
                order, expected = list(expect(left)), True
                free = [point for point in order if point in free]
            claim = trials.claim(free[0]) if free else None
            if claim is not None:
                _carry_out(trials, claim, judge)
                pause = _SHORTEST
            elif not free and not trials.bury():
                time.sleep(pause)
                pause = min(_LONGEST, 1.5 * pause)
        known = {point: trials.known[point] for point in points}
        if learn is not None:
            learn(known)
        return [value for value, _ in known.values()]

    return evaluate


def _carry_out(trials: Trials, claim: Claim, judge: Callable[[Point], Judgement]) -> None:
    begin = time.monotonic()
    try:
        with _beating(trials, claim):
            value, notes = judge(claim.point)
    except BaseException as error:
        trials.give_up(claim, f"{type(error).__name__}: {error}"[:500])
        raise
    seconds = round(time.monotonic() - begin, 4)
    trials.finish(claim, float("-inf") if math.isnan(value) else value, {"seconds": seconds, **notes})


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
