"""The limits of a budget as numbers, and which groups may shrink how far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import CostModel, IntArray
from attrim.core.scores import Scores
from attrim.errors import BudgetError, CriterionError

__all__ = ["Limits", "candidates", "frozen_groups", "limits_of"]

_COSTS = ("macs", "params", "channels")


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds in absolute units.

    Attributes:
        bounds: ``macs``/``params``/``channels`` -> (bound, value of the whole network).
    """

    cost: CostModel
    bounds: Mapping[str, tuple[int, int]]

    def slack(self, kept: IntArray) -> float:
        """Smallest distance below a bound, as a fraction of the whole network; negative when a bound is broken."""
        return min((bound - self.value(name, kept)) / whole for name, (bound, whole) in self.bounds.items())

    def value(self, name: str, kept: IntArray) -> int:
        """``macs``, ``params`` or ``channels`` of a network with these kept counts."""
        values = {"macs": self.cost.macs, "params": self.cost.params, "channels": self.cost.channels}
        return values[name](kept)


def limits_of(cost: CostModel, budget: Budget) -> Limits:
    """The budget's fractions as absolute bounds, rounded down."""
    bounds = {}
    for name in _COSTS:
        fraction = getattr(budget, name)
        if fraction is not None:
            whole = {"macs": cost.macs(), "params": cost.params(), "channels": cost.channels()}[name]
            bounds[name] = (int(fraction * whole + 1e-9), whole)
    return Limits(cost, bounds)


def frozen_groups(channels: ChannelMap, budget: Budget) -> set[str]:
    """Groups with a member that one of the globs names.

    Raises:
        BudgetError: a glob matches no axis of the model at all (a typing error would otherwise freeze nothing).
    """
    frozen: set[str] = set()
    for glob in budget.frozen:
        hits = {g.id for g in channels for m in g.members if _matches(glob, m.axis.tensor, m.axis.dim)}
        known = any(_matches(glob, name, d) for name, shape in channels.shapes.items() for d in range(len(shape)))
        if not known:
            some = ", ".join(f"{g.members[0].axis}" for g in list(channels)[:3])
            raise BudgetError(f"frozen: the glob '{glob}' matches no axis of the model. Axes look like: {some}.")
        frozen |= hits
    return frozen


def _matches(glob: str, tensor: str, dim: int) -> bool:
    return fnmatchcase(f"{tensor}:{dim}", glob) or fnmatchcase(tensor, glob)


def candidates(channels: ChannelMap, scores: Scores, budget: Budget) -> list[str]:
    """Groups that may shrink: scored and not frozen.

    Raises:
        CriterionError: scores for an unknown group or of the wrong length.
        BudgetError: nothing is left to prune.
    """
    for name, value in scores.values.items():
        if name not in channels.groups:
            raise CriterionError(
                f"criterion '{scores.criterion}' scored the group '{name}', which the channel map does not have. "
                "Score the channel map that you allocate on."
            )
        if len(value) != channels[name].size:
            raise CriterionError(
                f"criterion '{scores.criterion}' gave {len(value)} scores for group '{name}' of {channels[name].size} channels."
            )
    if not channels.groups:
        raise BudgetError(f"nothing in this network can be pruned. {_pinned_reasons(channels)}")
    frozen = frozen_groups(channels, budget)
    free = [g.id for g in channels if g.id in scores.values and g.id not in frozen]
    if not free:
        raise BudgetError("every group is frozen or without scores, so nothing can be pruned. Loosen `frozen`.")
    return free


def unreachable(channels: ChannelMap, limits: Limits, floors: IntArray, free: list[str], budget: Budget) -> BudgetError:
    """The error for a budget below what the floors allow: the smallest reachable value and what blocks it."""
    parts = []
    for name, (bound, whole) in limits.bounds.items():
        least = limits.value(name, floors)
        if least > bound:
            parts.append(
                f"{name} {bound / whole:.3f} asked, smallest reachable {least / whole:.4f} ({least:,} of {whole:,})"
            )
    held = len(channels.groups) - len(free)
    shrinkable = np.asarray([name in set(free) for name in channels.cost.groups])
    bare = np.where(shrinkable, np.minimum(1, floors), floors)
    name = next(iter(limits.bounds))
    text = (
        f"the budget cannot be met: {'; '.join(parts)}. What blocks it: the floors min_keep={budget.min_keep!r}, "
        f"max_removed={budget.max_removed!r}, multiple_of={budget.multiple_of} (with one channel per group "
        f"{limits.value(name, bare) / limits.bounds[name][1]:.4f} of the {name} would remain)"
    )
    if held:
        text += f"; {held} of {len(channels.groups)} groups are frozen or without scores"
    return BudgetError(f"{text}; {_pinned_reasons(channels)}")


def _pinned_reasons(channels: ChannelMap) -> str:
    if not channels.pinned:
        return "No axis is pinned."
    shown = "; ".join(f"{p.axis}: {p.reason}" for p in channels.pinned[:3])
    return f"{len(channels.pinned)} axes are pinned, for example {shown}."
