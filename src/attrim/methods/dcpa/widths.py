"""The search space: candidate widths of the groups, groups that decide together, and branches that may go."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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
    """

    name: str
    groups: tuple[str, ...]
    widths: IntArray
    branch: str | None = None

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
        """Group -> width, for one candidate of each unit; groups of a dropped branch are left out."""
        found: dict[str, int] = {}
        for unit, k in zip(self.units, choice, strict=True):
            if unit.branch is None or k:
                found |= dict(zip(unit.groups, unit.widths[k].tolist(), strict=True))
        return found


def make_space(
    channels: ChannelMap,
    groups: Collection[str],
    budget: Budget,
    *,
    ratios: Sequence[float] = RATIOS,
    share: Share = "group",
    by_channel: bool = False,
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

    Raises:
        InputError: a ratio out of its range. BudgetError: nothing is left to search.

    Example:
        >>> space = make_space(channels, ["layer1.0.conv1"], attrim.Budget(macs=0.5))
        >>> space.units[0].widths[:, 0].tolist()
        [2, 4, 6, 8, 10, 12, 14, 16]
    """
    wanted = sorted({float(r) for r in ratios} | {1.0})
    if not all(math.isfinite(r) and 0 < r <= 1 for r in wanted):
        raise InputError(f"ratios: expected kept fractions in (0, 1], found {tuple(ratios)!r}.")
    frozen = frozen_groups(channels, budget)
    names = [g.id for g in channels if g.id in groups and g.id not in frozen]
    step = budget.multiple_of
    floors = {g: min(channels[g].size, -(-budget.floor(channels[g].size) // step) * step) for g in names}
    names = [g for g in names if floors[g] < channels[g].size]
    if not names:
        raise BudgetError("no group is left to search: all are frozen, refused, or as narrow as their floors.")
    if by_channel:
        return SearchSpace(channels, (), tuple(names), floors, step)
    units = []
    for members in _together(names, share):
        table = np.stack([_widths(channels[g].size, floors[g], step, wanted) for g in members], axis=1)
        table = np.unique(table, axis=0)
        if len(table) > 1:
            units.append(Unit(members[0], members, table))
    return SearchSpace(channels, tuple(units), (), floors, step)


def _together(names: Sequence[str], share: Share) -> list[tuple[str, ...]]:
    if share == "group":
        return [(name,) for name in names]
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return [tuple(members) for members in blocks.values()]


def _widths(size: int, floor: int, step: int, ratios: Sequence[float]) -> IntArray:
    """One width for each ratio, the last being the whole group."""
    asked = np.array([int(r * size + 1e-9) for r in ratios], np.int64)
    near = (asked + step // 2) // step * step if step > 1 else asked
    found = np.clip(near, floor, size)
    found[-1] = size
    return found
