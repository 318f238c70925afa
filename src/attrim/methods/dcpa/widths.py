"""The search space: candidate widths of the groups, groups that decide together, and branches that may go."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

import numpy as np

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.errors import BudgetError, InputError
from attrim.search.limits import frozen_groups

__all__ = ["RATIOS", "SearchSpace", "Share", "Unit", "make_space"]

Share = Literal["group", "block"]

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What one categorical policy decides.

    Attributes:
        name: of the branch that may go, else of its first group.
        groups: whose widths it chooses, all by one index.
        widths: shape ``(K, len(groups))``; candidate widths, rising; row 0 is zero where ``branch`` is set.
        branch: what candidate 0 drops, or None.
        names: of the candidates, for people: "drop", then the kept fraction that gives the widths ("37.5 %").
    """

    name: str
    groups: tuple[str, ...]
    widths: IntArray
    branch: str | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.widths)


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All that is searched. Flat vectors over channels go unit by unit, group by group, then over ``gated`` groups.

    Attributes:
        channels: the map.
        units: categorical policies.
        gated: groups whose channels are decided one by one (``space="channel"``).
        floors: group -> the fewest channels that it keeps.
        multiple: widths are multiples of it, or whole.
    """

    channels: ChannelMap
    units: tuple[Unit, ...]
    gated: tuple[str, ...]
    floors: dict[str, int]
    multiple: int

    def __deepcopy__(self, memo: object) -> SearchSpace:
        return self  # nothing in it changes

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The searched groups in the order of flat vectors."""
        return (*(g for unit in self.units for g in unit.groups), *self.gated)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Group -> number of its first channel in flat vectors."""
        sizes = [self.channels[g].size for g in self.groups]
        return dict(zip(self.groups, np.cumsum([0, *sizes])[:-1].tolist(), strict=True))

    @property
    def size(self) -> int:
        """Channels in a flat vector."""
        return sum(self.channels[g].size for g in self.groups)

    @property
    def most(self) -> int:
        """The largest number of candidates of a unit."""
        return max((len(unit) for unit in self.units), default=1)

    def valid(self) -> np.ndarray:
        """Shape ``(U, K)``: which entries are candidates; units with fewer than ``K`` are padded at the end."""
        return np.arange(self.most)[None] < np.array([len(u) for u in self.units], np.int64).reshape(-1, 1)

    def slices(self) -> list[slice]:
        """The channels of each unit in a flat vector, then those of each gated group."""
        sizes = [sum(self.channels[g].size for g in unit.groups) for unit in self.units]
        sizes += [self.channels[g].size for g in self.gated]
        ends = np.cumsum(sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def kept(self, choice: Sequence[int]) -> dict[str, int]:
        """Group -> width, for one candidate of each unit; groups that vanish with a branch are left out."""
        gone = self.vanishing(self.drops(choice))
        found: dict[str, int] = {}
        for unit, k in zip(self.units, choice, strict=True):
            if unit.branch is None or k:
                found |= dict(zip(unit.groups, unit.widths[k].tolist(), strict=True))
        return {g: width for g, width in found.items() if g not in gone}

    def drops(self, choice: Sequence[int]) -> tuple[str, ...]:
        """Branches that go, for one candidate of each unit; what is inside another that goes is not named."""
        asked = [u.branch for u, k in zip(self.units, choice, strict=True) if u.branch is not None and not k]
        inside = {branch.id: branch.inside for branch in self.channels.branches}
        return tuple(b for b in asked if not _within(b, asked, inside))

    def vanishing(self, drops: Collection[str]) -> set[str]:
        """Groups that vanish with these branches."""
        inside = {branch.id: branch.inside for branch in self.channels.branches}
        gone = [b for b in self.channels.branches if b.id in drops or _within(b.id, drops, inside)]
        return {g for branch in gone for g in branch.groups}


def make_space(
    channels: ChannelMap,
    groups: Collection[str],
    budget: Budget,
    *,
    ratios: Sequence[float] = RATIOS,
    share: Share = "group",
    by_channel: bool = False,
    drop: bool = False,
) -> SearchSpace:
    """Candidate widths for ``groups`` within the floors and multiples of ``budget``.

    Each ratio ``r`` gives the width ``int(r * size)``, raised to the floor and rounded to the nearest multiple; equal
    widths are one candidate, so narrow groups have fewer; the whole group is always one. A group with a single candidate,
    or a frozen one, is not searched.

    Args:
        channels: the map of the network.
        groups: which may be searched.
        budget: its floors, multiples and frozen groups.
        ratios: kept fractions in (0, 1].
        share: ``group``: a policy for each group; ``block``: groups of one parent module choose the same ratio.
        by_channel: every channel of a group is decided on its own.
        drop: residual branches may vanish: the groups inside a branch choose one ratio together, and candidate 0 drops it.

    Raises:
        InputError: a ratio out of its range. BudgetError: nothing is left to search.

    Example:
        >>> space = make_space(channels, ["layer1.0.conv1"], attrim.Budget(macs=0.5))
        >>> space.units[0].widths[:, 0].tolist()
        [2, 4, 6, 8, 10, 12, 14, 16]
    """
    wanted = sorted({float(r) for r in ratios} | {1.0})
    if not all(math.isfinite(r) and 0 < r <= 1 for r in wanted):
        raise InputError(f"candidates: expected kept fractions in (0, 1], found {tuple(ratios)!r}.")
    frozen = frozen_groups(channels, budget)
    names = [g.id for g in channels if g.id in groups and g.id not in frozen]
    step = budget.multiple_of
    floors = {g: min(channels[g].size, -(-budget.floor(channels[g].size) // step) * step) for g in names}
    names = [g for g in names if floors[g] < channels[g].size]
    inner = _branches(channels, names, budget) if drop else {}
    if not names and not inner:
        raise BudgetError("no group is left to search: all are frozen, refused, or as narrow as their floors.")
    if by_channel:
        alone = tuple(Unit(id, (), np.zeros((2, 0), np.int64), id, ("drop", "100 %")) for id in inner)
        return SearchSpace(channels, alone, tuple(names), floors, step)
    inside = {g for members in inner.values() for g in members}
    parts = [(id, members) for id, members in inner.items()]
    parts += [("", members) for members in _together([g for g in names if g not in inside], share)]
    place = {g: i for i, g in enumerate(channels.groups)}
    parts.sort(key=lambda part: min((place[g] for g in part[1]), default=len(place)))
    units = []
    for branch, members in parts:
        columns = [_widths(channels[g].size, floors[g], step, wanted) for g in members]
        table, found = _rows(columns, wanted)
        if branch:
            table, found = np.concatenate([np.zeros((1, len(members)), np.int64), table]), ("drop", *found)
        if len(table) > 1:
            units.append(Unit(branch or members[0], members, table, branch or None, found))
    return SearchSpace(channels, tuple(units), (), floors, step)


def _branches(channels: ChannelMap, names: Collection[str], budget: Budget) -> dict[str, tuple[str, ...]]:
    """Branch that may go -> the searched groups of which it is the smallest branch, in network order."""
    cost = channels.cost
    owner = np.full(len(cost.groups), -1) if cost.group_branch is None else cost.group_branch
    smallest = {g: cost.branches[i] for g, i in zip(cost.groups, owner.tolist(), strict=True) if i >= 0}
    return {
        branch.id: tuple(g for g in names if smallest.get(g) == branch.id)
        for branch in channels.branches
        if branch.gate and not any(_frozen(channels, tensor, budget) for tensor in branch.tensors)
    }


def _frozen(channels: ChannelMap, tensor: str, budget: Budget) -> bool:
    forms = [tensor, *(f"{tensor}:{d}" for d in range(len(channels.shapes.get(tensor, ()))))]
    return any(fnmatchcase(form, glob) for form in forms for glob in budget.frozen)


def _within(branch: str, others: Collection[str], inside: Mapping[str, str]) -> bool:
    """Whether one of the others contains the branch."""
    outer = inside.get(branch, "")
    while outer:
        if outer in others:
            return True
        outer = inside.get(outer, "")
    return False


def _together(names: Sequence[str], share: Share) -> list[tuple[str, ...]]:
    if share == "group":
        return [(name,) for name in names]
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return [tuple(members) for members in blocks.values()]


def _rows(columns: Sequence[IntArray], ratios: Sequence[float]) -> tuple[IntArray, tuple[str, ...]]:
    """Different candidates, narrowest first, each with the largest ratio that gives it."""
    if not columns:
        return np.zeros((1, 0), np.int64), ("100 %",)
    table, place = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    largest = dict(zip(place.reshape(-1).tolist(), ratios, strict=True))  # ratios rise, the last one stays
    return table, tuple(f"{100 * largest[k]:g} %" for k in range(len(table)))


def _widths(size: int, floor: int, step: int, ratios: Sequence[float]) -> IntArray:
    """One width for each ratio, the last being the whole group."""
    asked = np.array([int(r * size + 1e-9) for r in ratios], np.int64)
    near = (asked + step // 2) // step * step if step > 1 else asked
    found = np.clip(near, floor, size)
    found[-1] = size
    return found
