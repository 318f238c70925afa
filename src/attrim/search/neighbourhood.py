"""The local neighbourhood search of ARPruning, as we read it: best-improvement hill climbing on the budget."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from attrim.errors import InputError
from attrim.search.protocol import Proposals, Search, Start
from attrim.search.space import FloatArray, Point, Space

__all__ = ["Shift", "neighbourhood", "neighbourhood_with"]

Shift = Literal["chosen", "all"]

_DRAWS = 4
"""Draws for each wanted neighbour before the neighbourhood counts as seen."""


def neighbourhood_with(
    *,
    groups: int = 2,
    delta: float = 0.2,
    finest: float = 0.025,
    neighbours: int = 10,
    failures: int = 3,
    shift: Shift = "chosen",
) -> Search:
    """The search of :func:`neighbourhood` with other settings.

    Args:
        groups: how many groups a neighbour differs in before it is projected, >= 1.
        shift: which groups make up for the change, so that the budget is met: the ``chosen`` ones alone, or ``all``. With
            ``chosen``, the first of them is any group and the others come behind it: a neighbour then agrees with the
            present point up to there, half of the network on average, and is evaluated from there on.
        delta: largest change of a kept fraction, in (0, 1].
        finest: the search restarts when ``delta`` falls below.
        neighbours: candidates in a batch, of which the best is taken.
        failures: batches without improvement after which ``delta`` is halved.

    Raises:
        InputError: a setting out of its range.
    """
    if shift not in get_args(Shift):
        raise InputError(f"shift: expected 'chosen' or 'all', found {shift!r}.")
    if groups < 1 or neighbours < 1 or failures < 1 or not 0 < finest <= delta <= 1:
        raise InputError(
            f"neighbourhood: expected groups, neighbours and failures >= 1 and 0 < finest <= delta <= 1, found {groups}, "
            f"{neighbours}, {failures}, {finest} and {delta}."
        )

    def search(space: Space, start: Start, seed: int) -> Proposals:
        random = np.random.default_rng(seed)
        seen: set[Point] = set()
        here = yield from start(space)
        restarts = 0
        value = (yield [here])[0]
        seen.add(here)
        best, best_value = here, value
        while True:
            step, lost = delta, 0
            while step >= finest:
                batch = _neighbours(space, here, step, groups, neighbours, seen, random, shift)
                seen.update(batch)
                values = yield batch
                top = int(np.argmax(values)) if batch else -1
                if batch and values[top] > value:
                    here, value, lost = batch[top], values[top], 0
                    continue
                lost += 1
                if lost == failures:
                    step, lost = step / 2, 0
            if value > best_value:
                best, best_value = here, value
            restarts += 1
            here = _redrawn(space, best, 0.3 if restarts % 2 else 1.0, random)
            value = (yield [here])[0]
            seen.add(here)

    return search


neighbourhood: Search = neighbourhood_with()
"""Hill climbing by best improvement. A neighbour changes two groups' kept fractions by up to ``delta`` each and is
projected on the budget by a shift of these two; the best of ten new ones replaces the present point if it is better. After three batches without
improvement ``delta`` halves; below 0.025 the search starts anew, by turns from the best point with 30 % of its groups
redrawn and from random ratios.

Source: T. Yuan et al., ARPruning, Neural Networks 174, 2024, names a local neighbourhood search of the ratios; every detail
here is our reading (two groups: Lin et al., ABCPruner, IJCAI 2020).
"""


def _neighbours(
    space: Space,
    here: Point,
    delta: float,
    groups: int,
    count: int,
    seen: set[Point],
    random: np.random.Generator,
    shift: Shift,
) -> list[Point]:
    base = space.ratios(here)
    found: dict[Point, None] = {}
    groups = min(groups, len(space))
    for _ in range(_DRAWS * count):
        ratios = base.copy()
        chosen = _from_one_on(len(space), groups, random) if shift == "chosen" else None
        if chosen is None:
            chosen = random.choice(len(space), size=groups, replace=False)
        ratios[chosen] = np.clip(ratios[chosen] + random.uniform(-delta, delta, len(chosen)), 0, 1)
        point = space.project(ratios, only=chosen if shift == "chosen" else None)
        if point not in seen and space.fits(point):
            found[point] = None
        if len(found) == count:
            break
    return list(found)


def _from_one_on(size: int, groups: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Numbers of one group, any that has enough behind it, and of others behind it."""
    first = int(random.integers(size - groups + 1))
    behind = random.choice(np.arange(first + 1, size), size=groups - 1, replace=False)
    return np.concatenate([[first], behind]).astype(np.int64)


def _redrawn(space: Space, base: Point, share: float, random: np.random.Generator) -> Point:
    """``base`` with new ratios in this share of its groups."""
    ratios: FloatArray = random.uniform(0.1, 1, len(space))
    return space.project(np.where(random.random(len(space)) < share, ratios, space.ratios(base)))
