"""The local neighbourhood search of ARPruning, as we read it: best-improvement hill climbing on the budget."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Draw:
    """How neighbours are drawn; see :func:`neighbourhood_with`."""

    groups: int
    count: int
    siblings: int
    shift: Shift

    def neighbours(
        self, space: Space, here: Point, delta: float, seen: set[Point], random: np.random.Generator
    ) -> list[Point]:
        """New points on the budget."""
        base = space.ratios(here)
        exchange = self.siblings > 1 and self.shift == "chosen" and min(self.groups, len(space)) > 1
        found: dict[Point, None] = {}
        draws = _DRAWS * self.count
        while draws > 0 and len(found) < self.count:
            first = _Change.of(space, self.groups, delta, random) if exchange else None
            born = 0
            for _ in range(min(draws, 2 * self.siblings)):
                draws -= 1
                point = (
                    self._anywhere(space, base, delta, random) if first is None else first.point(space, base, random)
                )
                if point not in seen and point not in found and space.fits(point):
                    found[point] = None
                    born += 1
                if born == self.siblings or len(found) == self.count:
                    break
        return list(found)

    def _anywhere(self, space: Space, base: FloatArray, delta: float, random: np.random.Generator) -> Point:
        groups = min(self.groups, len(space))
        chosen = (
            _from_one_on(len(space), groups, random)
            if self.shift == "chosen"
            else random.choice(len(space), size=groups, replace=False)
        )
        ratios = base.copy()
        ratios[chosen] = np.clip(ratios[chosen] + random.uniform(-delta, delta, len(chosen)), 0, 1)
        return space.project(ratios, only=chosen if self.shift == "chosen" else None)


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of one group, for which others behind it make up."""

    group: int
    by: float
    others: int
    delta: float

    @classmethod
    def of(cls, space: Space, groups: int, delta: float, random: np.random.Generator) -> _Change:
        """Of any group that has enough behind it."""
        others = min(groups, len(space)) - 1
        return cls(int(random.integers(len(space) - others)), random.uniform(-delta, delta), others, delta)

    def point(self, space: Space, base: FloatArray, random: np.random.Generator) -> Point:
        """With others that make up for it."""
        ratios = base.copy()
        ratios[self.group] = np.clip(ratios[self.group] + self.by, 0, 1)
        behind = random.choice(np.arange(self.group + 1, len(space)), size=self.others, replace=False)
        ratios[behind] = np.clip(ratios[behind] + random.uniform(-self.delta, self.delta, self.others), 0, 1)
        return space.project(ratios, only=behind)


def neighbourhood_with(
    *,
    groups: int = 2,
    delta: float = 0.2,
    finest: float = 0.025,
    neighbours: int = 10,
    failures: int = 3,
    shift: Shift = "chosen",
    siblings: int = 1,
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
        siblings: with ``chosen`` and more than 1, so many neighbours share the change of their first group, for which the others
            make up; what they have in common is run once. More found less in as many evaluations when it was measured.

    Raises:
        InputError: a setting out of its range.
    """
    if shift not in get_args(Shift):
        raise InputError(f"shift: expected 'chosen' or 'all', found {shift!r}.")
    if min(groups, neighbours, failures, siblings) < 1 or not 0 < finest <= delta <= 1:
        raise InputError(
            "neighbourhood: expected groups, neighbours, failures and siblings >= 1 and 0 < finest <= delta <= 1, found "
            f"{groups}, {neighbours}, {failures}, {siblings}, {finest} and {delta}."
        )
    draw = _Draw(groups, neighbours, siblings, shift)

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
                batch = draw.neighbours(space, here, step, seen, random)
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
projected on the budget by a shift of these two; the best of ten new ones replaces the present point if it is better. After
three batches without improvement ``delta`` halves; below 0.025 the search starts anew, by turns from the best point with 30 %
of its groups redrawn and from random ratios.

Source: T. Yuan et al., ARPruning, Neural Networks 174, 2024, names a local neighbourhood search of the ratios; every detail
here is our reading (two groups: Lin et al., ABCPruner, IJCAI 2020).
"""


def _from_one_on(size: int, groups: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Numbers of one group, any that has enough behind it, and of others behind it."""
    first = int(random.integers(size - groups + 1))
    behind = random.choice(np.arange(first + 1, size), size=groups - 1, replace=False)
    return np.concatenate([[first], behind]).astype(np.int64)


def _redrawn(space: Space, base: Point, share: float, random: np.random.Generator) -> Point:
    """``base`` with new ratios in this share of its groups."""
    ratios: FloatArray = random.uniform(0.1, 1, len(space))
    return space.project(np.where(random.random(len(space)) < share, ratios, space.ratios(base)))
