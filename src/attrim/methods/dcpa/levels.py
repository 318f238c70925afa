"""Networks along one number: the largest ratio, or the lowest threshold, that fits the budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from attrim.core.cost import IntArray
from attrim.errors import BudgetError
from attrim.methods.dcpa.derive import WINDOW, Derived, number_of, slack_of
from attrim.methods.dcpa.widths import SearchSpace
from attrim.search.limits import Limits

__all__ = ["by_threshold", "uniform"]

_HALVINGS = 50


def uniform(space: SearchSpace, limits: Limits) -> Derived:
    """One ratio for all searched groups, the largest that fits the budget; nothing is dropped.

    The control that a searched network has to beat.
    """
    field = _Field(space, limits, ())
    return field.derived(field.largest(lambda level: level * field.sizes, 0.0, 1.0), lambda kept: -kept / field.sizes)


def by_threshold(
    space: SearchSpace, limits: Limits, logits: Mapping[str, Tensor], keep: Tensor, stay: Collection[str] = ()
) -> Derived:
    """One threshold for the logits of all single channels, the lowest that fits the budget.

    Branches that more likely go than stay are dropped; where that is more than the budget asks for, the likeliest to stay
    come back, and where it is not enough, others follow.

    Args:
        space: gated groups, and units that hold nothing but a branch.
        limits: the budget.
        logits: group -> shape ``(size,)``.
        keep: shape ``(U,)``; log-odds of keeping each branch.
        stay: branches that may not be dropped.

    Raises:
        BudgetError: the budget cannot be met while these stay.
    """
    fixed = torch.tensor([unit.branch in stay for unit in space.units], dtype=torch.bool)
    keep = keep.detach().cpu().masked_fill(fixed, torch.inf)
    order = np.argsort(-keep.numpy(), kind="stable").tolist()
    stays = int((keep >= 0).sum())

    def field_of(count: int) -> _Field:
        gone = set(order[count:])
        return _Field(space, limits, space.drops([0 if u in gone else 1 for u in range(len(order))]))

    while stays > 0 and field_of(stays).slack(field_of(stays).floors) < 0:
        stays -= 1
    if stays < int(fixed.sum()):
        raise BudgetError(
            "the narrowest widths are above the budget while these branches stay: allow more to be dropped."
        )
    while stays < len(order):
        field, wider = field_of(stays), field_of(stays + 1)
        if field.slack(field.sizes) <= WINDOW or wider.slack(wider.floors) < 0:
            break
        stays += 1
    field = field_of(stays)
    values = [np.sort(logits[g].detach().cpu().numpy().astype(np.float64))[::-1] for g in field.groups]

    def counts(level: float) -> np.ndarray:
        return np.array([float((v >= -level).sum()) for v in values])

    def wish(kept: IntArray) -> np.ndarray:
        return np.array([v[min(int(n), len(v) - 1)] for v, n in zip(values, kept, strict=True)])

    high = 1.0 - min((float(v.min()) for v in values), default=0.0)
    low = -1.0 - max((float(v.max()) for v in values), default=0.0)
    return field.derived(field.largest(counts, low, high), wish)


class _Field:
    """Widths of the groups that are left when some branches are dropped."""

    def __init__(self, space: SearchSpace, limits: Limits, drops: Collection[str]) -> None:
        self.space, self.limits, self.drops = space, limits, tuple(drops)
        gone = space.vanishing(drops)
        self.groups: Sequence[str] = [g for g in space.groups if g not in gone]
        self.numbers = np.array([number_of(space.channels, g) for g in self.groups], np.int64)
        self.sizes = np.array([space.channels[g].size for g in self.groups], np.int64)
        self.floors = np.array([space.floors[g] for g in self.groups], np.int64)

    def slack(self, kept: IntArray) -> float:
        """What is left of the budget with these widths, as a fraction of the whole network."""
        vector = self.limits.cost.sizes.copy()
        vector[self.numbers] = kept
        return slack_of(self.limits, vector, self.drops)

    def largest(self, asked: Callable[[float], np.ndarray], low: float, high: float) -> IntArray:
        """Widths at the largest level that fits; ``asked`` rises with the level. The floors where none does."""

        def at(level: float) -> IntArray:
            wanted = asked(level)
            step = self.space.multiple
            near = np.floor(wanted / step + 1e-9).astype(np.int64) * step
            return np.where(wanted >= self.sizes, self.sizes, np.clip(near, self.floors, self.sizes))

        if self.slack(at(high)) >= 0:
            return at(high)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.slack(at(middle)) >= 0 else (low, middle)
        return at(low)

    def derived(self, kept: IntArray, wish: Callable[[IntArray], np.ndarray]) -> Derived:
        """The widths, filled up one step at a time, the largest wish first, while more than the window is left."""
        kept = kept.copy()
        closed = np.zeros(len(kept), bool)
        moves = 0
        while self.slack(kept) > WINDOW and not closed.all():
            best = int(np.where(closed, -np.inf, wish(kept)).argmax())
            before = kept[best]
            kept[best] = min(self.sizes[best], (before // self.space.multiple + 1) * self.space.multiple)
            if kept[best] == before or self.slack(kept) < 0:
                kept[best], closed[best] = before, True
            else:
                moves += 1
        found = dict(zip(self.groups, kept.tolist(), strict=True))
        return Derived((), found, self.drops, moves, self.slack(kept))
