"""The price of a policy: the cost model multiplied out, so that its expectation is exact and has a gradient."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from attrim.core.cost import CostModel, Terms
from attrim.methods.dcpa.widths import SearchSpace
from attrim.search.limits import Limits

__all__ = ["Prices"]

Powers: TypeAlias = tuple[tuple[int, int], ...]
"""``((group number, power), ...)`` in rising order."""

Monomial: TypeAlias = tuple[Powers, int]
"""Powers, and the innermost branch that takes the term with it, or -1; a coefficient is kept beside it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """``Σ_m coefficient_m · Π_d factors[index_{m,d}]``, with factor 0 being 1."""

    coefficient: Tensor
    index: Tensor

    def __call__(self, factors: Tensor) -> Tensor:
        """``(..., F)`` to ``(...)``."""
        return (factors[..., self.index].prod(-1) * self.coefficient).sum(-1)


class Prices:
    """Multiply-adds, parameters and channels of a policy, as far as the budget limits them.

    Every width of the cost model is linear in the kept counts, so every term is a polynomial in them. Multiplied out, each
    monomial is a product over independent units, and its expectation the product of theirs: ``E[c1 c2] = E[c1] E[c2]``
    for two groups, ``E[c²]`` (not ``E[c]²``) where one group stands on both sides of a layer.

    Args:
        space: the units.
        limits: bounds in absolute units.

    Attributes:
        names: the limited resources.
        bounds, whole: shape ``(R,)``, float64; the bound and the value of the whole network for each.
    """

    def __init__(self, space: SearchSpace, limits: Limits) -> None:
        cost = limits.cost
        self.names = tuple(limits.bounds)
        self.bounds = torch.tensor([float(bound) for bound, _ in limits.bounds.values()], dtype=torch.float64)
        self.whole = torch.tensor([float(whole) for _, whole in limits.bounds.values()], dtype=torch.float64)
        number = {name: i for i, name in enumerate(cost.groups)}
        searched = {number[g] for g in space.groups}
        book = _Book(space, number)
        terms = {"macs": cost.mac_terms, "params": cost.param_terms}
        self._sums = [
            book.add(_polynomial(cost, terms[n], searched) if n in terms else _count(cost, searched))
            for n in self.names
        ]
        count = len(book.rows)
        self._sums = [_Sum(s.coefficient, torch.where(s.index < 0, count - s.index, s.index)) for s in self._sums]
        rows = np.array(book.rows, np.float64).reshape(len(book.rows), space.most)
        self._rows, self._owner = torch.from_numpy(rows), torch.tensor(book.owners, dtype=torch.int64)
        self._moments = torch.tensor(book.moments, dtype=torch.int64).reshape(-1, 2)
        self.powers = int(self._moments[:, 1].max()) if len(book.moments) else 1

    def to(self, device: torch.device) -> Prices:
        """Move the tables."""
        for name in ("bounds", "whole", "_rows", "_owner", "_moments"):
            setattr(self, name, getattr(self, name).to(device))
        self._sums = [_Sum(s.coefficient.to(device), s.index.to(device)) for s in self._sums]
        return self

    def expected(self, probabilities: Tensor, moments: Tensor | None = None) -> Tensor:
        """Expected cost, shape ``(R,)``, float64, differentiable.

        Args:
            probabilities: shape ``(U, K)``, of the candidates of each unit.
            moments: shape ``(gated groups, P)``; ``E[c], E[c²], …`` of the gated groups, where there are any.
        """
        parts = [self._rows.new_ones(1), (probabilities.double()[self._owner] * self._rows).sum(1)]
        if moments is not None and len(self._moments):
            parts.append(moments.double()[self._moments[:, 0], self._moments[:, 1] - 1])
        factors = torch.cat(parts)
        return torch.stack([one(factors) for one in self._sums])

    def at(self, choices: Tensor) -> Tensor:
        """Cost of chosen candidates, shape ``(N, R)``, float64 and exact.

        Args:
            choices: shape ``(N, U)``; the candidate of each unit.
        """
        rows = self._rows.expand(len(choices), *self._rows.shape)
        factors = rows.gather(2, choices[:, self._owner, None]).squeeze(2)
        factors = torch.cat([factors.new_ones(len(choices), 1), factors], 1)
        return torch.stack([one(factors) for one in self._sums], 1)

    def slack(self, costs: Tensor) -> Tensor:
        """Smallest distance below a bound, as a fraction of the whole network; ``(..., R)`` to ``(...)``."""
        return ((self.bounds - costs) / self.whole).min(-1).values


class _Book:
    """Numbers the distinct factors of all monomials: rows of one value for each candidate, or moments."""

    def __init__(self, space: SearchSpace, number: dict[str, int]) -> None:
        self.space = space
        self.unit_of = {number[g]: (u, col) for u, unit in enumerate(space.units) for col, g in enumerate(unit.groups)}
        self.gated = {number[g]: i for i, g in enumerate(space.gated)}
        cost = space.channels.cost
        unit_of = {unit.branch: u for u, unit in enumerate(space.units) if unit.branch is not None}
        self.unit_of_branch = {i: unit_of[id] for i, id in enumerate(cost.branches) if id in unit_of}
        self.inside, self.sizes = cost.inside.tolist(), cost.sizes
        self.branch_of = [-1] * len(cost.sizes) if cost.group_branch is None else cost.group_branch.tolist()
        self.rows: list[list[float]] = []
        self.owners: list[int] = []
        self.moments: list[tuple[int, int]] = []
        self._known: dict[tuple[int, Powers, bool], int] = {}
        self._known_moments: dict[tuple[int, int], int] = {}

    def add(self, polynomial: Counter[Monomial]) -> _Sum:
        """The sum with its factors numbered: rows by positive numbers, moments by negative ones until all are known."""
        parts = [(c * n, p, e) for monomial, c in polynomial.items() for n, p, e in self._spread(*monomial)]
        found = [self._factors(powers, ending) for _, powers, ending in parts]
        longest = max([len(f) for f in found], default=0) or 1
        index = torch.zeros(len(found), longest, dtype=torch.int64)
        for i, factors in enumerate(found):
            index[i, : len(factors)] = torch.tensor(factors, dtype=torch.int64)
        return _Sum(torch.tensor([float(c) for c, *_ in parts], dtype=torch.float64), index)

    def _spread(self, powers: Powers, branch: int) -> list[tuple[int, Powers, frozenset[int]]]:
        """A monomial as a sum of products of independent units: coefficient, powers, units whose "drop" ends it.

        A group that vanishes with an outer branch counts in full in what still runs: ``c I + size (1 - I)`` with ``I`` for
        keeping the outer branches.
        """
        items: list[tuple[int, Powers, frozenset[int]]] = [(1, (), self._chain(branch))]
        for group, power in powers:
            outer = self._chain(self.branch_of[group]) - {self.unit_of.get(group, (-1, 0))[0]}
            size = int(self.sizes[group]) ** power
            grown = []
            for c, p, ending in items:
                more = outer - ending
                grown.append((c, (*p, (group, power)), ending | more))
                grown += [(c * size, p, ending), (-c * size, p, ending | more)] if more else []
            items = grown
        return items

    def _chain(self, branch: int) -> frozenset[int]:
        """The units that drop a branch or one around it."""
        found = set()
        while branch >= 0:
            found |= {self.unit_of_branch[branch]} if branch in self.unit_of_branch else set()
            branch = self.inside[branch]
        return frozenset(found)

    def _factors(self, powers: Powers, ending: frozenset[int]) -> list[int]:
        parts: dict[int, list[tuple[int, int]]] = {u: [] for u in sorted(ending)}
        factors = []
        for group, power in powers:
            if group in self.gated:
                factors.append(self._moment(self.gated[group], power))
            else:
                u, column = self.unit_of[group]
                parts.setdefault(u, []).append((column, power))
        return factors + [self._row(u, tuple(part), u in ending) for u, part in parts.items()]

    def _moment(self, gated: int, power: int) -> int:
        key = (gated, power)
        if key not in self._known_moments:
            self._known_moments[key] = len(self.moments)
            self.moments.append(key)
        return -1 - self._known_moments[key]

    def _row(self, u: int, part: Powers, ends: bool) -> int:
        """The number of a row: the product of the unit's widths, and 0 where its branch is dropped and takes the term along."""
        key = (u, part, ends)
        if key not in self._known:
            unit = self.space.units[u]
            values = np.ones(len(unit))
            for column, power in part:
                widths = unit.widths[:, column].astype(np.float64)
                if unit.branch is not None:  # what still runs without the branch (a product of zeros) runs in full
                    widths[0] = self.space.channels[unit.groups[column]].size
                values = values * widths**power
            if ends:
                values[0] = 0.0
            self._known[key] = len(self.rows) + 1
            self.rows.append([*values.tolist(), *[0.0] * (self.space.most - len(unit))])
            self.owners.append(u)
        return self._known[key]


def _polynomial(cost: CostModel, terms: Terms, searched: set[int]) -> Counter[Monomial]:
    """A sum of terms multiplied out; groups that are not searched are whole."""
    linear = _linear(cost, searched)
    total: Counter[Monomial] = Counter()
    branches = [-1] * len(terms.coefficient) if terms.branch is None else terms.branch.tolist()
    for coefficient, factors, branch in zip(terms.coefficient.tolist(), terms.factors.tolist(), branches, strict=True):
        for parts in product(*(linear[w] for w in factors)):
            number = coefficient
            powers: Counter[int] = Counter()
            for value, group in parts:
                number *= value
                if group >= 0:
                    powers[group] += 1
            if number:
                total[tuple(sorted(powers.items())), branch] += number
    return total


def _linear(cost: CostModel, searched: set[int]) -> list[list[tuple[int, int]]]:
    """Each width as ``[(multiplicity, group), …]``, with group -1 for its constant part."""
    constant = cost.widths.fixed.copy()
    entries: list[list[tuple[int, int]]] = [[] for _ in constant]
    table = zip(cost.widths.row.tolist(), cost.widths.group.tolist(), cost.widths.multiplicity.tolist(), strict=True)
    for row, group, multiplicity in table:
        if group in searched:
            entries[row].append((multiplicity, group))
        else:
            constant[row] += multiplicity * cost.sizes[group]
    return [
        [*own, *([(fixed, -1)] if fixed or not own else [])]
        for own, fixed in zip(entries, constant.tolist(), strict=True)
    ]


def _count(cost: CostModel, searched: set[int]) -> Counter[Monomial]:
    """The number of channels."""
    owner = [-1] * len(cost.sizes) if cost.group_branch is None else cost.group_branch.tolist()
    total: Counter[Monomial] = Counter()
    for g, size in enumerate(cost.sizes.tolist()):
        if g in searched:
            total[((g, 1),), owner[g]] += 1
        else:
            total[(), owner[g]] += size
    return total
