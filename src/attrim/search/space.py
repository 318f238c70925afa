"""The space of a ratio search: how many channels every group may keep, and the way from any ratios onto the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import CostModel, IntArray
from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.search.limits import Limits, candidates, limits_of, unreachable

__all__ = ["FloatArray", "Point", "Space"]

FloatArray = npt.NDArray[np.float64]

Point = tuple[int, ...]
"""A candidate: the kept count of every group, in the cost model's order, frozen groups included."""

TOLERANCE = 0.005
"""A projection this far below the budget, as a fraction of the whole network, is topped up."""

_HALVINGS = 40


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """Kept counts within the floors, the multiples and the limits of a budget.

    Attributes:
        cost: prices a candidate.
        limits: what must hold.
        free: shape (F,); numbers of the groups that may shrink, by position in ``cost.groups``.
        floors: shape (G,); fewest channels; equal to the size where a group may not shrink.
        multiple: widths are multiples of it, or whole.

    Example:
        >>> space = Space.of(channels, scores, Budget(macs=0.5))
        >>> kept = space.project(np.full(len(space), 0.6))
        >>> channels.cost.macs(kept) <= 0.5 * channels.cost.macs()
        True
    """

    cost: CostModel
    limits: Limits
    free: IntArray
    floors: IntArray
    multiple: int = 1

    @classmethod
    def of(cls, channels: ChannelMap, scores: Scores, budget: Budget) -> Space:
        """The space of all groups that have scores and are not frozen.

        Raises:
            BudgetError: the floors do not fit the budget; says the smallest reachable value and what blocks it.
            CriterionError: the scores do not fit the channel map.
        """
        names = candidates(channels, scores, budget)
        numbers = {name: i for i, name in enumerate(channels.cost.groups)}
        free = np.array([numbers[name] for name in names], dtype=np.int64)
        sizes, step = channels.cost.sizes, budget.multiple_of
        floors = sizes.copy()
        least = np.array([budget.floor(int(n)) for n in sizes[free]], dtype=np.int64)
        floors[free] = np.minimum(sizes[free], -(-least // step) * step)
        limits = limits_of(channels.cost, budget)
        if limits.slack(floors) < 0:
            raise unreachable(channels, limits, floors, names, budget)
        return cls(channels.cost, limits, free, floors, step)

    def __len__(self) -> int:
        return len(self.free)

    @property
    def sizes(self) -> IntArray:
        """Shape (F,); channels of the free groups."""
        return self.cost.sizes[self.free]

    def ratios(self, kept: Point | IntArray) -> FloatArray:
        """Kept fraction of each free group, in (0, 1]; shape (F,)."""
        return np.asarray(kept, dtype=np.int64)[self.free] / self.sizes

    def fits(self, kept: Point | IntArray) -> bool:
        """Whether every limit and every floor holds."""
        vector = np.asarray(kept, dtype=np.int64)
        return bool((vector >= self.floors).all()) and self.limits.slack(vector) >= 0

    def project(self, ratios: FloatArray, only: IntArray | None = None) -> Point:
        """The candidate on the budget that is nearest to ``ratios`` along a common shift.

        The shift is bisected; the step at which the budget would break is taken group by group while it holds, and if
        more than 0.5 % of the whole network is still left, so are further channels, those first that the ratios ask for
        most. Deterministic; ratios above one another in every group give kept counts above one another at the same shift.

        Args:
            ratios: shape (F,), kept fraction wanted of each free group; any finite numbers.
            only: numbers of the free groups that are shifted; the others get what ``ratios`` say, and the result may lie
                beyond the budget where these groups cannot make up for it. None shifts all.

        Raises:
            InputError: another shape, or numbers that are not finite.

        Source: bisection on a common shift is our reading of ARPruning's local search; the tolerance is that of EagleEye
        (Li et al., ECCV 2020).
        """
        wanted = np.asarray(ratios, dtype=np.float64)
        if wanted.shape != self.free.shape or not np.isfinite(wanted).all():
            raise InputError(f"ratios: expected {len(self)} finite numbers, one per free group, found {ratios!r}.")
        moved = np.ones(len(self)) if only is None else np.zeros(len(self))
        moved[() if only is None else only] = 1.0
        low, high = float(-1 - wanted.max()), float(2 - wanted.min())
        if self.limits.slack(self.at(wanted, high * moved)) >= 0:
            return _point(self.at(wanted, high * moved))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.limits.slack(self.at(wanted, middle * moved)) >= 0:
                low = middle
            else:
                high = middle
        kept, above = self.at(wanted, low * moved), self.at(wanted, high * moved)
        if self.limits.slack(kept) >= 0:
            self._top_up(kept, above, wanted + low * moved, 0.0, moved > 0)
            self._top_up(kept, self.cost.sizes, wanted + low * moved, TOLERANCE, moved > 0)
        return _point(kept)

    def at(self, ratios: FloatArray, shift: float | FloatArray) -> IntArray:
        """Kept counts, shape (G,), of ``ratios + shift`` rounded to the allowed widths; the budget may not hold."""
        kept = self.cost.sizes.copy()
        asked = np.clip(ratios + shift, 0, 1) * self.sizes
        widths = np.floor(asked / self.multiple + 0.5).astype(np.int64) * self.multiple
        full = self.sizes - asked < asked - (self.sizes - 1) // self.multiple * self.multiple
        kept[self.free] = np.clip(np.where(full, self.sizes, widths), self.floors[self.free], self.sizes)
        return kept

    def _top_up(
        self, kept: IntArray, ceiling: IntArray, ratios: FloatArray, spare: float, moved: npt.NDArray[np.bool_]
    ) -> None:
        """Raise groups step by step in place, largest wish first, while the limits hold and more than ``spare`` is left."""
        closed = ~moved
        while self.limits.slack(kept) > spare:
            mine = kept[self.free]
            wish = np.where(closed | (mine >= ceiling[self.free]), -np.inf, ratios - mine / self.sizes)
            best = int(wish.argmax())
            if wish[best] == -np.inf:
                return
            group = self.free[best]
            before = kept[group]
            kept[group] = min(int(self.cost.sizes[group]), (int(before) // self.multiple + 1) * self.multiple)
            if self.limits.slack(kept) < 0:
                kept[group] = before
                closed[best] = True


def _point(kept: IntArray) -> Point:
    return tuple(kept.tolist())
