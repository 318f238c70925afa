"""From a policy to a network within the budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.errors import BudgetError
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.sample import decided
from attrim.methods.dcpa.widths import SearchSpace
from attrim.search.limits import Limits, unreachable

__all__ = ["WINDOW", "Derived", "check_reach", "number_of", "repair", "slack_of"]

WINDOW = 0.01
"""The derived network costs between the budget less this fraction of the whole network, and the budget."""


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """What a policy comes to.

    Attributes:
        choice: shape ``(U,)``; the candidate of each unit after the repair.
        kept: group -> width, of the searched groups that are not dropped.
        drops: branches that go.
        moved: steps of the repair.
        slack: what is left of the budget, as a fraction of the whole network.
        check: how the drops were judged (:func:`attrim.methods.dcpa.check.checked`), as JSON values; None if they were not.
    """

    choice: tuple[int, ...]
    kept: Mapping[str, int]
    drops: tuple[str, ...]
    moved: int
    slack: float
    check: Mapping[str, Any] | None = None


def check_reach(space: SearchSpace, limits: Limits, budget: Budget) -> None:
    """Refuse a budget below the smallest network of the space, before anything is trained.

    Raises:
        BudgetError: says the smallest reachable value and what blocks it.
    """
    least: IntArray = limits.cost.sizes
    best = -np.inf
    for branches in (0, 1):  # a branch that goes usually costs nothing, and attention on zeros still something
        choice = [branches if unit.branch is not None else 0 for unit in space.units]
        kept = _vector(space, choice, limits)
        for group in space.gated:
            kept[number_of(space.channels, group)] = space.floors[group]
        slack = slack_of(limits, kept, space.drops(choice))
        if slack > best:
            least, best = kept, slack
    if best < 0:
        raise unreachable(space.channels, limits, least, list(space.groups), budget)


def repair(
    space: SearchSpace,
    prices: Prices,
    log_probabilities: Tensor,
    limits: Limits,
    *,
    fine: bool = True,
    stay: Collection[str] = (),
) -> Derived:
    """The most probable candidates, moved one at a time until the network costs what it may.

    What is most probable is told in two parts, as it is drawn: see :func:`attrim.methods.dcpa.sample.decided`.

    Above the budget, the move to the next narrower candidate that costs the policy least (in log-probability, for each
    share of the tightest limit saved) is made until the budget holds; more than 1 % below it, moves to wider ones that stay
    within it.
    Where one candidate is worth more than the window, single channels (or multiples) fill up the rest. Deterministic.

    Args:
        space: the units.
        prices: their cost.
        log_probabilities: shape ``(U, K)``.
        limits: the budget, of this network; need not be the one of the search.
        fine: fill up with widths between the candidates.
        stay: branches that may not be dropped.

    Returns:
        A network that never costs more than the budget, and at most 1 % of the whole network less, unless the next
        channel would break it.

    Raises:
        BudgetError: even the narrowest candidates cost more.
    """
    drop = torch.tensor([unit.branch is not None for unit in space.units])
    scores = decided(log_probabilities.detach().double().cpu(), drop).numpy()
    least = np.array([int(unit.branch is not None and unit.branch in stay) for unit in space.units], np.int64)
    scores[least > 0, 0] = -np.inf
    walk = _Walk(space, prices, scores, least)
    moved = walk.down() + walk.up()
    kept, drops = walk.vector(limits), space.drops(walk.choice.tolist())
    left = slack_of(limits, kept, drops)
    if left < 0:
        raise BudgetError(
            f"the narrowest network of the search space{' with its branches' if stay else ''} is {-left:.4f} of the whole above "
            "the budget. Allow narrower candidates: candidates=(0.05, 0.1, ...), Budget(min_keep=...)."
        )
    if fine:
        moved += _fill(space, scores, walk.choice, kept, limits)
    gone = space.vanishing(drops)
    widths = {g: int(kept[number_of(space.channels, g)]) for g in space.groups if g not in gone}
    return Derived(tuple(walk.choice.tolist()), widths, drops, moved, slack_of(limits, kept, drops))


def slack_of(limits: Limits, kept: IntArray, drops: Collection[str] = ()) -> float:
    """Smallest distance below a bound, as a fraction of the whole network; negative when a bound is broken."""
    cost = limits.cost
    values = {"macs": cost.macs, "params": cost.params, "channels": cost.channels}
    return min((bound - values[name](kept, drops)) / whole for name, (bound, whole) in limits.bounds.items())


class _Walk:
    """Moves from candidate to candidate, never below ``least``."""

    def __init__(self, space: SearchSpace, prices: Prices, scores: np.ndarray, least: IntArray) -> None:
        self.space, self.prices, self.scores, self.choice = space, prices, scores, scores.argmax(1)
        self.least = least
        self.last = np.array([len(unit) - 1 for unit in space.units], np.int64)
        self.branches = np.array([unit.branch is not None for unit in space.units], bool)

    def down(self) -> int:
        """Cheaper until the budget holds, or nothing is cheaper; returns the number of moves."""
        moves = 0
        while self._slack(self.choice[None])[0] < 0:
            back = (self.choice == 0) & self.branches  # what runs on without a branch runs in full: it may cost more
            units = np.concatenate([np.flatnonzero(self.choice > self.least), np.flatnonzero(back)])
            if not self._move(units, np.where(self.choice[units] > 0, -1, 1), 1):
                break
            moves += 1
        return moves

    def up(self) -> int:
        """Wider while more than the window is left; returns the number of moves."""
        moves = 0
        while self._slack(self.choice[None])[0] > WINDOW:
            units = np.flatnonzero(self.choice < self.last)
            units = units[self._slack(self._moved(units, np.ones_like(units))) >= 0]
            if not self._move(units, np.ones_like(units), -1):
                break
            moves += 1
        return moves

    def vector(self, limits: Limits) -> IntArray:
        """Kept counts of all groups."""
        return _vector(self.space, self.choice.tolist(), limits)

    def _move(self, units: IntArray, steps: IntArray, sign: int) -> bool:
        """Make the move that costs the policy least for each share that it saves (or spends, ``sign = -1``), if any does."""
        before = self._slack(self.choice[None])[0]
        saved = sign * (self._slack(self._moved(units, steps)) - before)
        loss = self.scores[units, self.choice[units]] - self.scores[units, self.choice[units] + steps]
        units, steps, price = (a[saved > 1e-12] for a in (units, steps, loss / np.maximum(saved, 1e-12)))
        if not len(units):
            return False
        best = np.lexsort((units, price))[0]
        self.choice[units[best]] += steps[best]
        return True

    def _moved(self, units: IntArray, steps: IntArray) -> IntArray:
        moved = np.repeat(self.choice[None], len(units), 0)
        moved[np.arange(len(units)), units] += steps
        return moved

    def _slack(self, choices: IntArray) -> np.ndarray:
        found: np.ndarray = self.prices.slack(self.prices.at(torch.from_numpy(choices))).numpy()
        return found


def _fill(space: SearchSpace, scores: np.ndarray, choice: IntArray, kept: IntArray, limits: Limits) -> int:
    """Raise single groups in place, the one whose next candidate is likeliest first, while more than the window is left."""
    wishes, drops = [], space.drops(choice.tolist())
    gone = space.vanishing(drops)
    for u, unit in enumerate(space.units):
        k = int(choice[u])
        if unit.branch is not None and k == 0:
            continue
        wish = scores[u, k + 1] - scores[u, k] if k + 1 < len(unit) else -np.inf
        wishes += [
            (-wish, u, number_of(space.channels, g), space.channels[g].size) for g in unit.groups if g not in gone
        ]
    wishes.sort()
    moves = 0
    while slack_of(limits, kept, drops) > WINDOW:
        before = moves
        for *_, g, size in wishes:
            old = int(kept[g])
            kept[g] = min(size, (old // space.multiple + 1) * space.multiple)
            if kept[g] == old or slack_of(limits, kept, drops) < 0:
                kept[g] = old
                continue
            moves += 1
            if slack_of(limits, kept, drops) <= WINDOW:
                break
        if moves == before:
            break
    return moves


def _vector(space: SearchSpace, choice: list[int], limits: Limits) -> IntArray:
    kept = limits.cost.sizes.copy()
    for group, width in space.kept(choice).items():
        kept[number_of(space.channels, group)] = width
    return kept


def number_of(channels: ChannelMap, group: str) -> int:
    """The place of a group in the cost model's vectors."""
    return channels.cost.groups.index(group)
