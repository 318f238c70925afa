"""A budget: what the pruned network may cost, and what must not be touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from attrim.errors import BudgetError

__all__ = ["Budget", "Scope"]

Scope = Literal["global", "group", "isomorphic"]

_FRACTIONS = ("macs", "params", "channels")


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on a pruned network. Fractions always mean what is *kept*; all limits given must hold.

    Attributes:
        macs: largest kept fraction of the multiply-adds, in (0, 1].
        params: largest kept fraction of the parameters, in (0, 1].
        channels: largest kept fraction of the prunable channels, in (0, 1]; a tied group counts once.
        latency_ms: reserved for the latency budget; a value raises until it is measured (see ``docs/budget.md``).
        min_keep: floor of every group: an int is a number of channels, a float in (0, 1] a fraction of the group
            (rounded up). At least one channel always stays. The default keeps a tenth of every group, so that no layer
            collapses.
        multiple_of: widths of the groups are rounded to the nearest multiple within the limits (1 = any width). A
            group that is narrower than the multiple stays whole.
        max_removed: largest fraction of any single group that may go, in [0, 1]. The stricter of this and ``min_keep``
            holds.
        frozen: globs over axis names as they print (``layer1.0.conv2.weight:0``); without ``:dim`` every axis of the
            tensor is meant. A group with one frozen member is frozen whole.
        scope: ``global`` ranks all channels together, ``group`` gives each group the same ratio, ``isomorphic`` gives
            groups of the same structure the same share and ranks within them.

    Raises:
        BudgetError: a value outside its range, with the range and an example.

    Example:
        >>> Budget(macs=0.5, multiple_of=8, frozen=("conv1.*",)).macs
        0.5
    """

    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    latency_ms: float | None = None
    min_keep: int | float = 0.1
    multiple_of: int = 1
    max_removed: float = 1.0
    frozen: tuple[str, ...] = ()
    scope: Scope = "global"

    def __post_init__(self) -> None:
        for name in _FRACTIONS:
            _check_fraction(name, getattr(self, name))
        if all(getattr(self, name) is None for name in (*_FRACTIONS, "latency_ms")):
            raise BudgetError(
                "a budget needs at least one limit: macs, params or channels, each the fraction that is kept. "
                "For example Budget(macs=0.5) keeps half of the multiply-adds."
            )
        if self.latency_ms is not None:
            raise BudgetError(
                "latency_ms: a latency budget is not implemented yet and would be ignored. Use macs= and multiple_of=8, "
                "and read the measured latency in the result."
            )
        self._check_floors()
        self._check_rest()

    def _check_floors(self) -> None:
        keep: Any = self.min_keep
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not math.isfinite(keep) or keep <= 0:
            raise BudgetError(f"min_keep: expected a positive int (channels) or a float in (0, 1], found {keep!r}.")
        if not isinstance(keep, int) and keep > 1:
            raise BudgetError(
                f"min_keep: a float is a fraction in (0, 1], found {keep!r}. For channels write min_keep={math.ceil(keep)}."
            )
        removed: Any = self.max_removed
        if isinstance(removed, bool) or not isinstance(removed, (int, float)) or not 0 <= removed <= 1:
            raise BudgetError(f"max_removed: expected a fraction in [0, 1], found {removed!r}.")

    def _check_rest(self) -> None:
        multiple: Any = self.multiple_of
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise BudgetError(f"multiple_of: expected an int >= 1, found {multiple!r}.")
        frozen: Any = self.frozen
        if isinstance(frozen, str):
            raise BudgetError(
                f"frozen: expected a tuple of globs, found the string {frozen!r}. Write frozen=({frozen!r},)."
            )
        object.__setattr__(self, "frozen", tuple(frozen))
        if self.scope not in get_args(Scope):
            raise BudgetError(f"scope: expected one of {', '.join(get_args(Scope))}, found {self.scope!r}.")

    def floor(self, size: int) -> int:
        """The fewest channels that a group of ``size`` channels keeps."""
        least = self.min_keep if isinstance(self.min_keep, int) else math.ceil(self.min_keep * size - 1e-9)
        capped = math.ceil(size * (1 - self.max_removed) - 1e-9)
        return min(size, max(1, least, capped))


def _check_fraction(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        hint = f" {value!r} looks like a percentage; write {name}={value / 100:g}." if _percent(value) else ""
        raise BudgetError(
            f"{name}: expected the fraction that is kept, in (0, 1], found {value!r}.{hint} "
            f"For example Budget({name}=0.5) keeps half."
        )


def _percent(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 2 <= value <= 100
