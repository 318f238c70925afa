"""From a policy to a network within the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.errors import BudgetError
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.widths import SearchSpace
from attrim.search.limits import Limits, unreachable

__all__ = ["WINDOW", "Derived", "check_reach", "repair", "uniform_choice"]

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
    """

    choice: tuple[int, ...]
    kept: Mapping[str, int]
    drops: tuple[str, ...]
    moved: int
    slack: float


def check_reach(space: SearchSpace, limits: Limits, budget: Budget) -> None:
    """Refuse a budget below the smallest network of the space, before anything is trained.

    Raises:
        BudgetError: says the smallest reachable value and what blocks it.
    """
    least = _vector(space, [0] * len(space.units), limits)
    for group in space.gated:
        least[_number(space.channels, group)] = space.floors[group]
    if limits.slack(least) < 0:
        raise unreachable(space.channels, limits, least, list(space.groups), budget)


def repair(
    space: SearchSpace, prices: Prices, log_probabilities: Tensor, limits: Limits, *, fine: bool = True
) -> Derived:
    """The most probable candidates, moved one at a time until the network costs what it may.

    Above the budget, the move to the next narrower candidate that costs the policy least (in log-probability, for each
    multiply-add saved) is made until the budget holds; more than 1 % below it, moves to wider ones that stay within it.
    Where one candidate is worth more than the window, single channels (or multiples) fill up the rest. Deterministic.

    Args:
        space: the units.
        prices: their cost.
        log_probabilities: shape ``(U, K)``.
        limits: the budget, of this network; need not be the one of the search.
        fine: fill up with widths between the candidates.

    Returns:
        A network that never costs more than the budget, and at most 1 % of the whole network less, unless the next
        channel would break it.

    Raises:
        BudgetError: even the narrowest candidates cost more.
    """
    scores = log_probabilities.detach().double().cpu().numpy()
    choice = scores.argmax(1)
    walk = _Walk(space, prices, scores, choice)
    moved = walk.down() + walk.up()
    kept = walk.vector(limits)
    if limits.slack(kept) < 0:
        raise BudgetError(
            f"the narrowest network of the search space is {-limits.slack(kept):.4f} of the whole above the budget. Allow "
            "narrower candidates: ratios=(0.05, 0.1, ...), Budget(min_keep=...)."
        )
    if fine:
        moved += _fill(space, scores, walk.choice, kept, limits)
    dropped = {i for i, unit in enumerate(space.units) if unit.branch is not None and walk.choice[i] == 0}
    drops = tuple(space.units[i].branch or "" for i in sorted(dropped))
    gone = {g for i in dropped for g in space.units[i].groups}
    widths = {g: int(kept[_number(space.channels, g)]) for g in space.groups if g not in gone}
    return Derived(tuple(walk.choice.tolist()), widths, drops, moved, limits.slack(kept))


class _Walk:
    """Moves from candidate to candidate."""

    def __init__(self, space: SearchSpace, prices: Prices, scores: np.ndarray, choice: IntArray) -> None:
        self.space, self.prices, self.scores, self.choice = space, prices, scores, choice.copy()
        self.last = np.array([len(unit) - 1 for unit in space.units], np.int64)

    def down(self) -> int:
        """Narrower until the budget holds; returns the number of moves."""
        moves = 0
        while self._slack(self.choice[None])[0] < 0:
            open_ = np.flatnonzero(self.choice > 0)
            if not len(open_):
                break
            self.choice[self._best(open_, -1, None)] -= 1
            moves += 1
        return moves

    def up(self) -> int:
        """Wider while more than the window is left; returns the number of moves."""
        moves = 0
        while self._slack(self.choice[None])[0] > WINDOW:
            open_ = np.flatnonzero(self.choice < self.last)
            fits = self._slack(self._moved(open_, 1)) >= 0
            if not fits.any():
                break
            self.choice[self._best(open_[fits], 1, None)] += 1
            moves += 1
        return moves

    def vector(self, limits: Limits) -> IntArray:
        """Kept counts of all groups."""
        return _vector(self.space, self.choice.tolist(), limits)

    def _best(self, units: IntArray, step: int, _: None) -> int:
        costs = self.prices.at(torch.from_numpy(np.concatenate([self.choice[None], self._moved(units, step)])))
        shares = (costs / self.prices.whole).numpy()
        change = np.abs(shares[1:] - shares[:1]).max(1)
        loss = self.scores[units, self.choice[units]] - self.scores[units, self.choice[units] + step]
        return int(units[np.lexsort((units, loss / np.maximum(change, 1e-12)))[0]])

    def _moved(self, units: IntArray, step: int) -> IntArray:
        moved = np.repeat(self.choice[None], len(units), 0)
        moved[np.arange(len(units)), units] += step
        return moved

    def _slack(self, choices: IntArray) -> np.ndarray:
        found: np.ndarray = self.prices.slack(self.prices.at(torch.from_numpy(choices))).numpy()
        return found


def _fill(space: SearchSpace, scores: np.ndarray, choice: IntArray, kept: IntArray, limits: Limits) -> int:
    """Raise single groups in place, the one whose next candidate is likeliest first, while more than the window is left."""
    wishes = []
    for u, unit in enumerate(space.units):
        k = int(choice[u])
        if unit.branch is not None and k == 0:
            continue
        wish = scores[u, k + 1] - scores[u, k] if k + 1 < len(unit) else -np.inf
        wishes += [(-wish, u, _number(space.channels, g), space.channels[g].size) for g in unit.groups]
    wishes.sort()
    moves = 0
    while limits.slack(kept) > WINDOW:
        before = moves
        for *_, g, size in wishes:
            old = int(kept[g])
            kept[g] = min(size, (old // space.multiple + 1) * space.multiple)
            if kept[g] == old or limits.slack(kept) < 0:
                kept[g] = old
                continue
            moves += 1
            if limits.slack(kept) <= WINDOW:
                break
        if moves == before:
            break
    return moves


def uniform_choice(space: SearchSpace, limits: Limits) -> dict[str, int]:
    """Group -> width: one ratio for all searched groups, the largest that fits the budget, filled up channel by channel.

    The control that a searched network has to beat. Nothing is dropped.
    """
    numbers = np.array([_number(space.channels, g) for g in space.groups], np.int64)
    sizes = np.array([space.channels[g].size for g in space.groups], np.int64)
    floors = np.array([space.floors[g] for g in space.groups], np.int64)

    def at(ratio: float) -> IntArray:
        kept = space.channels.cost.sizes.copy()
        near = np.floor(ratio * sizes / space.multiple + 1e-9).astype(np.int64) * space.multiple
        kept[numbers] = np.where(ratio >= 1, sizes, np.clip(near, floors, sizes))
        return kept

    low, high = 0.0, 1.0
    if limits.slack(at(1.0)) >= 0:
        low = 1.0
    for _ in range(40 if low < 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if limits.slack(at(middle)) >= 0 else (low, middle)
    kept = at(low)
    progress = True
    while progress and limits.slack(kept) > WINDOW:
        progress = False
        for number, size in sorted(zip(numbers.tolist(), sizes.tolist(), strict=True), key=lambda p: kept[p[0]] / p[1]):
            old = int(kept[number])
            kept[number] = min(size, (old // space.multiple + 1) * space.multiple)
            if kept[number] == old or limits.slack(kept) < 0:
                kept[number] = old
                continue
            progress = True
            if limits.slack(kept) <= WINDOW:
                break
    return {g: int(kept[n]) for g, n in zip(space.groups, numbers.tolist(), strict=True)}


def _vector(space: SearchSpace, choice: list[int], limits: Limits) -> IntArray:
    kept = limits.cost.sizes.copy()
    for group, width in space.kept(choice).items():
        kept[_number(space.channels, group)] = width
    return kept


def _number(channels: ChannelMap, group: str) -> int:
    return channels.cost.groups.index(group)
