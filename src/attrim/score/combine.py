"""Combining numbers: across the members of a group (reduction), and within a group (normalisation)."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from attrim.errors import CriterionError

__all__ = ["NORMALIZERS", "REDUCTIONS", "normalized", "reduced"]


def _ratio(value: Tensor, by: Tensor) -> Tensor:
    """``value / by``, and 0 where ``by`` is 0: a group of zeros stays zeros."""
    return torch.where(by == 0, torch.zeros_like(value), value / torch.where(by == 0, torch.ones_like(by), by))


def _lamp(value: Tensor) -> Tensor:
    """``s_c / Σ s_v`` over the channels ``v`` that rank at or above ``c``; among equals the lower index is higher."""
    descending, order = value.sort(descending=True, stable=True)
    return torch.zeros_like(value).scatter(0, order, _ratio(descending, descending.cumsum(0)))


def _rank(value: Tensor) -> Tensor:
    """``1 / n`` for the least important to 1 for the most; among equals the lower index counts more."""
    order = value.argsort(descending=True, stable=True)
    places = torch.arange(len(value), 0, -1, dtype=value.dtype, device=value.device) / len(value)
    return torch.zeros_like(value).scatter(0, order, places)


REDUCTIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "mean": lambda v: v.mean(0),
        "sum": lambda v: v.sum(0),
        "max": lambda v: v.amax(0),
        "min": lambda v: v.amin(0),
        "prod": lambda v: v.prod(0),
        "first": lambda v: v[0],
    }
)
"""Name -> function from the members' values, shape ``(members, size)``, to the group's, shape ``(size,)``."""

NORMALIZERS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": lambda v: v,
        "mean": lambda v: _ratio(v, v.mean()),
        "max": lambda v: _ratio(v, v.amax()),
        "sum": lambda v: _ratio(v, v.sum()),
        "standardize": lambda v: _ratio(v - v.amin(), v.amax() - v.amin()),
        "gaussian": lambda v: _ratio(v - v.mean(), v.std(correction=0)),
        "lamp": _lamp,
        "rank": _rank,
    }
)
"""Name -> function of one group's values, shape ``(size,)`` to ``(size,)``; all keep the order within the group."""


def reduced(values: Tensor, reduction: str) -> Tensor:
    """The members' values, shape ``(members, size)``, as the group's, shape ``(size,)``."""
    return _choose("reduction", REDUCTIONS, reduction)(values)


def normalized(value: Tensor, normalize: str) -> Tensor:
    """One group's values made comparable with other groups'; shape ``(size,)``."""
    return _choose("normalize", NORMALIZERS, normalize)(value)


def _choose(
    what: str, table: MappingProxyType[str, Callable[[Tensor], Tensor]], name: str
) -> Callable[[Tensor], Tensor]:
    if name not in table:
        raise CriterionError(f"{what}: expected one of {', '.join(table)}, found {name!r}.")
    return table[name]
