"""A budget for each round: what the original may keep, said for a network that has been cut already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import BudgetError
from attrim.methods.scoring import score
from attrim.methods.table import METHODS

__all__ = ["COSTS", "Floors", "RoundBudget", "Schedule", "budget_of_round", "kept_after"]

Schedule = Literal["geometric", "linear"]

COSTS = ("macs", "params", "channels")


@dataclass(frozen=True, slots=True)
class RoundBudget(Budget):
    """A budget whose floors were worked out for the original's widths.

    Attributes:
        floors: width of a group now (as text: a plan keeps its budget as JSON) -> fewest channels that stay of it.
    """

    floors: Mapping[str, int] = field(default_factory=dict)

    def floor(self, size: int) -> int:
        """The fewest channels that a group of ``size`` channels keeps."""
        return min(size, self.floors[str(size)] if str(size) in self.floors else Budget.floor(self, size))


@dataclass(frozen=True, slots=True)
class Floors:
    """Fewest channels of each group, in terms of the original.

    :func:`attrim.allocate` asks a budget for floors by width alone, but groups of one width now may have had different
    widths in the beginning. There are two ways around it. *Lifted*: the lower floor is asked for, and the channels below
    the true one are scored above all others, so that they go last; exact where all channels are ranked together (scope
    ``global``). *Raised*: the higher floor holds for all groups of that width, which may put a budget out of reach.

    Attributes:
        budget: of the whole run.
        sizes: group id -> width in the original.
        now: group id -> width now.
    """

    budget: Budget
    sizes: Mapping[str, int]
    now: Mapping[str, int]

    @classmethod
    def after(cls, budget: Budget, plan: PruningPlan) -> Floors:
        """The floors of a network that ``plan`` has cut."""
        notes = {name: note for name, note in plan.groups.items() if isinstance(note, Mapping)}
        return cls(budget, {n: int(v["size"]) for n, v in notes.items()}, {n: int(v["kept"]) for n, v in notes.items()})

    def of(self, group: str, size: int) -> int:
        """Fewest channels of a group that is ``size`` wide now, a multiple where the budget asks for one."""
        least, multiple = self.budget.floor(self.sizes.get(group, size)), self.budget.multiple_of
        return min(size, -(-least // multiple) * multiple)

    def ways(self, method: str | Callable[..., Any]) -> tuple[bool, ...]:
        """Whether to lift, in the order in which it is tried.

        Lifting takes scores alone. A method from a paper does more to the network, so it is run whole where it can be.
        """
        whole = isinstance(method, str) and method in METHODS
        return (True,) if self.budget.scope == "global" and not whole else (False, True)

    def by_width(self, lifted: bool) -> dict[str, int]:
        """Width now -> floor, for :class:`RoundBudget`."""
        choose = min if lifted else max
        found: dict[str, list[int]] = {}
        for name, width in self.now.items():
            found.setdefault(str(width), []).append(self.budget.floor(self.sizes[name]))
        return {width: choose(floors) for width, floors in found.items()}

    def guard(
        self, method: str | Callable[..., Any], options: Mapping[str, Any]
    ) -> Callable[[nn.Module, ChannelMap, Iterable[Any] | None], Scores]:
        """A criterion that scores as ``method`` does, and lifts what must stay above everything else."""

        def guarded(model: nn.Module, channels: ChannelMap, batches: Iterable[Any] | None) -> Scores:
            return self._lifted(score(model, channels, method, batches, **options))

        return guarded

    def _lifted(self, scores: Scores) -> Scores:
        largest = max((float(v.abs().max()) for v in scores.values.values()), default=0.0)
        values = {}
        for name, value in scores.values.items():
            top = torch.argsort(value, descending=True, stable=True)[: self.of(name, len(value))]
            values[name] = value.index_add(0, top, torch.full((len(top),), 2 * largest + 1))
        return Scores(values, scores.criterion)

    def check(self, plan: PruningPlan, channels: ChannelMap) -> None:
        """See that a round's plan respects them.

        Raises:
            BudgetError: it does not, because the budget cannot be reached otherwise.
        """
        for name, note in plan.groups.items():
            least = self.of(name, channels[name].size)
            if note["kept"] < least:
                raise BudgetError(
                    f"the budget cannot be met in rounds: group '{name}' has {self.sizes.get(name, channels[name].size)} "
                    f"channels in the original and keeps at least {least} (min_keep={self.budget.min_keep!r}, "
                    f"max_removed={self.budget.max_removed!r}), the limits leave {note['kept']}. Loosen one of them."
                )


def kept_after(budget: Budget, name: str, number: int, rounds: int, schedule: Schedule) -> float | None:
    """Fraction of the original's cost ``name`` that is kept after round ``number`` of ``rounds``.

    Example:
        >>> kept_after(Budget(macs=0.25), "macs", 1, 2, "geometric")
        0.5
    """
    final: float | None = getattr(budget, name)
    if final is None:
        return None
    share = number / rounds
    return float(final**share) if schedule == "geometric" else 1 - (1 - final) * share


def budget_of_round(
    budget: Budget,
    plan: PruningPlan | None,
    number: int,
    rounds: int,
    schedule: Schedule,
    *,
    lifted: bool = True,
) -> Budget | None:
    """What round ``number`` (from 1) may keep of the network as it is now; None when it is small enough already.

    Args:
        budget: of the whole run.
        plan: what has been cut so far, with its costs.
        number, rounds, schedule: see :func:`kept_after`.
        lifted: how floors are said, see :class:`Floors`.
    """
    limits: dict[str, float | None] = {}
    for name in COSTS:
        kept = kept_after(budget, name, number, rounds, schedule)
        if kept is not None and plan is not None:
            before, after = plan.provenance[f"{name}_before"], plan.provenance[f"{name}_after"]
            kept = min(1.0, int(kept * before + 1e-9) / after)
        limits[name] = kept
    if plan is None:
        return dataclasses.replace(budget, **limits)  # type: ignore[arg-type]
    if all(kept is None or kept >= 1 for kept in limits.values()):
        return None
    fields = {f.name: getattr(budget, f.name) for f in dataclasses.fields(Budget)}
    return RoundBudget(**{**fields, **limits}, floors=Floors.after(budget, plan).by_width(lifted))
