"""Scores + budget -> plan: how many channels every group keeps, and which."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import AttrimWarning, InputError
from attrim.search.decide import plan_from_kept
from attrim.search.limits import Limits, candidates, limits_of, unreachable

__all__ = ["allocate"]

_TOLERANCE = 0.01
"""A plan this far below its budget, as a fraction of the whole network, is worth a warning."""

_FILL_STEPS = 2000

_RATIO_STEPS = 4096
"""Resolution of a common ratio."""


def allocate(channels: ChannelMap, scores: Scores, budget: Budget) -> PruningPlan:
    """Choose what stays: the least important channels go first until every limit holds.

    The threshold (``scope="global"``) or the common ratio (``"group"``, ``"isomorphic"``) is found by bisection on the
    compiled cost; what is left of the budget is given back to the most important removed channels that still fit. Ties
    are broken by position: the lower index counts as more important. Deterministic.

    Args:
        channels: the traced network.
        scores: a score for every channel of every group that may shrink.
        budget: the limits; every one holds in the result, within 1 % of the original below it.

    Raises:
        BudgetError: the limits cannot be reached; says the smallest reachable value and what blocks it.
        CriterionError: the scores do not fit the channel map.

    Warns:
        AttrimWarning: the widths are too coarse to come within 1 % of the budget.

    Example:
        >>> plan = attrim.allocate(channels, scores, attrim.Budget(macs=0.5, multiple_of=8))
    """
    if not isinstance(channels, ChannelMap) or not isinstance(scores, Scores):
        raise InputError(
            f"allocate expects (ChannelMap, Scores, Budget), found {type(channels).__name__} and {type(scores).__name__}. "
            "channels = attrim.trace(model, inputs); scores = attrim.score(model, channels, 'l2')."
        )
    if not isinstance(budget, Budget):
        raise InputError(f"budget: expected an attrim.Budget, found {budget!r}. For example attrim.Budget(macs=0.5).")
    free = candidates(channels, scores, budget)
    limits = limits_of(channels.cost, budget)
    field = _Field.of(channels, scores, budget, free)
    if limits.slack(field.floors) < 0:
        raise unreachable(channels, limits, field.floors, free, budget)
    kept, ceiling = _smallest_cut(field, limits)
    kept = _give_back(field, limits, kept, field.sizes if budget.scope == "global" else ceiling)
    slack = limits.slack(kept)
    if slack > _TOLERANCE and (kept < field.sizes).any():
        warnings.warn(
            f"the widths are too coarse for this budget: the result lies {100 * slack:.1f} % of the whole network below it "
            f"(multiple_of={budget.multiple_of}, {len(free)} groups).",
            AttrimWarning,
            stacklevel=2,
        )
    names = channels.cost.groups
    selection = {names[g]: np.sort(field.ranked[g][: kept[g]]) for g in field.free}
    limits_asked = {k: v for k, v in dataclasses.asdict(budget).items() if v is not None}
    return plan_from_kept(
        channels, selection, {"criterion": scores.criterion, "budget": {**limits_asked, "frozen": list(budget.frozen)}}
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Field:
    """What allocation works on: groups by number, in the cost model's order.

    Attributes:
        sizes: shape ``(G,)``.
        floors: shape ``(G,)``; fewest channels (equal to the size where a group may not shrink).
        free: numbers of the groups that may shrink.
        ranked: per group its channels, most important first.
        level: ``level(n)`` gives the kept counts at step ``n`` of ``steps``; never growing in ``n``.
    """

    sizes: IntArray
    floors: IntArray
    free: list[int]
    ranked: dict[int, IntArray]
    value: dict[int, npt.NDArray[np.float32]]
    multiple: int
    level: Callable[[int], IntArray]
    steps: int

    @classmethod
    def of(cls, channels: ChannelMap, scores: Scores, budget: Budget, free: list[str]) -> _Field:
        numbers = {name: i for i, name in enumerate(channels.cost.groups)}
        sizes = channels.cost.sizes
        value = {numbers[n]: scores.values[n].numpy() for n in free}
        ranked = {g: np.lexsort((np.arange(len(v)), -v)) for g, v in value.items()}
        floors = sizes.copy()
        for g in value:
            floors[g] = _round_up(budget.floor(int(sizes[g])), int(sizes[g]), budget.multiple_of)
        order = _removal_order(ranked, value, floors)
        kinds = {g: channels[channels.cost.groups[g]].kind for g in value}
        if budget.scope == "global":
            level, steps = _by_threshold(sizes, order), len(order)
        elif budget.scope == "group":
            level, steps = _by_ratio(sizes, list(value)), _RATIO_STEPS
        else:
            level, steps = _by_kind(sizes, order, kinds), _RATIO_STEPS
        return cls(sizes, floors, list(value), ranked, value, budget.multiple_of, level, steps)

    def kept(self, n: int) -> IntArray:
        """Kept counts at step ``n``, rounded to the multiple and held above the floors."""
        kept = self.level(n)
        if self.multiple > 1:
            for g in self.free:
                kept[g] = _round_nearest(int(kept[g]), int(self.sizes[g]), self.multiple)
        return np.minimum(self.sizes, np.maximum(kept, self.floors))


def _round_up(count: int, size: int, multiple: int) -> int:
    return min(size, -(-count // multiple) * multiple)


def _round_nearest(count: int, size: int, multiple: int) -> int:
    """The nearest allowed width: a multiple, or the whole group."""
    below = count // multiple * multiple
    above = min(size, below + multiple)
    return below if below and count - below < above - count else above


def _removal_order(
    ranked: dict[int, IntArray], value: dict[int, npt.NDArray[np.float32]], floors: IntArray
) -> IntArray:
    """Groups in the order in which they lose a channel: lowest score first, the floors' channels never."""
    group, score, rank = [], [], []
    for g, order in ranked.items():
        losable = order[floors[g] :][::-1]
        group.append(np.full(len(losable), g))
        score.append(value[g][losable])
        rank.append(np.arange(len(losable)))
    groups = np.concatenate([np.zeros(0, np.int64), *group])
    return groups[np.lexsort((groups, np.concatenate([np.zeros(0), *rank]), np.concatenate([np.zeros(0), *score])))]


def _by_threshold(sizes: IntArray, order: IntArray) -> Callable[[int], IntArray]:
    return lambda n: sizes - np.bincount(order[:n], minlength=len(sizes))


def _by_ratio(sizes: IntArray, free: list[int]) -> Callable[[int], IntArray]:
    mask = np.zeros(len(sizes), bool)
    mask[free] = True

    def level(n: int) -> IntArray:
        return np.where(mask, np.round(sizes * (1 - n / _RATIO_STEPS)).astype(np.int64), sizes)

    return level


def _by_kind(sizes: IntArray, order: IntArray, kinds: dict[int, str]) -> Callable[[int], IntArray]:
    """Every kind loses the same share of its channels, its least important ones over all its groups."""
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    kind_of = np.zeros(len(sizes), np.int64)
    for g, kind in kinds.items():
        kind_of[g] = numbers[kind]
    queues = [order[kind_of[order] == k] for k in range(len(numbers))]
    totals = [sum(int(sizes[g]) for g in kinds if kind_of[g] == k) for k in range(len(numbers))]

    def level(n: int) -> IntArray:
        gone = [queue[: round(total * n / _RATIO_STEPS)] for queue, total in zip(queues, totals, strict=True)]
        return sizes - np.bincount(np.concatenate([np.zeros(0, np.int64), *gone]), minlength=len(sizes))

    return level


def _smallest_cut(field: _Field, limits: Limits) -> tuple[IntArray, IntArray]:
    """Bisect for the first step at which every limit holds; returns its widths and those of the step before."""
    low, high = 0, field.steps
    while low < high:
        middle = (low + high) // 2
        if limits.slack(field.kept(middle)) >= 0:
            high = middle
        else:
            low = middle + 1
    kept = field.kept(low)
    return (kept if limits.slack(kept) >= 0 else field.floors.copy()), field.kept(max(0, low - 1))


def _give_back(field: _Field, limits: Limits, kept: IntArray, ceiling: IntArray) -> IntArray:
    """Return the most important removed channels while the limits hold, up to ``ceiling``; within a group by rank."""
    kept = kept.copy()
    closed: set[int] = set()
    for _ in range(_FILL_STEPS):
        if limits.slack(kept) < 1e-4:
            break
        best, best_score, best_count = -1, -np.inf, 0
        for g in field.free:
            if g in closed or kept[g] >= ceiling[g]:
                continue
            score = float(field.value[g][field.ranked[g][kept[g]]])
            if score > best_score:
                count = min(int(field.sizes[g]), (int(kept[g]) // field.multiple + 1) * field.multiple)
                best, best_score, best_count = g, score, count
        if best < 0:
            break
        before = kept[best]
        kept[best] = best_count
        if limits.slack(kept) < 0:
            kept[best] = before
            closed.add(best)
    return kept
