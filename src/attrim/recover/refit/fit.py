"""The fit: a ridge regression towards the weights that are there, judged on rows that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from attrim.modules.distributed import all_sum

__all__ = ["RIDGES", "Change", "Problem", "fit"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as fractions of the mean square (or variance) of the inputs."""

_CHUNK = 8192
"""Rows whose products are summed in the data's own precision before they go into the float64 sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Rows of one regression.

    Attributes:
        inputs: ``(rows, blocks, width)``: what each output reads.
        target: ``(rows, blocks · outputs)``: what should be found there.
        base: the same shape: what is found there now.
        held: ``(rows,)`` bool: rows that only judge.
        centred: whether a constant can be added to each output as well.
        rectified: whether values below zero only need to stay below zero.
        rounds: fits in a row of a rectified problem, once the ridge is chosen.
        ridges: which ridges are tried; the best on the held rows is taken.
        widest: most columns of one system; wider ones are solved block by block (Gauss-Seidel).
    """

    inputs: Tensor
    target: Tensor
    base: Tensor
    held: Tensor
    centred: bool
    rectified: bool
    rounds: int = 3
    ridges: tuple[float, ...] = RIDGES
    widest: int = 4608


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What to add to a weight.

    Attributes:
        weight: ``(blocks, outputs, width)``, float64, in units of the place of comparison.
        bias: ``(blocks · outputs,)``, float64.
        before, after: mean squared error on the held rows, relative to the target's mean square there.
        ridge: the fraction that was chosen.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float
    ridge: float


def fit(problem: Problem) -> Change | None:
    """The change that brings the outputs closest to the target; None if nothing is better than leaving it.

    ``min Σ ‖d − ΔV u − c‖² + λ‖ΔV‖²`` over ΔV (and c when ``centred``), where d is what is missing. With
    ``rectified``, d is taken anew after each fit: where the target is below zero, what is found there only has to be
    below zero as well.

    Source:
        He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, eq. 5 (linear least
        squares from the pruned prefix to the dense outputs); Zhang et al., "Accelerating Very Deep Convolutional
        Networks", TPAMI 2016, section 3.2 (responses behind the ReLU). The ridge towards the present weights, its
        choice on held rows and the one-sided targets are ours.
    """
    seen, unseen = _Part.of(problem, ~problem.held), _Part.of(problem, problem.held)
    moments = _Moments.of(seen, problem)
    sums = _Sums(moments, problem)
    before, whole = unseen.error(problem, unseen.base)
    if sums.rows < 1 or before <= 1e-12 * whole:
        return None
    best: tuple[float, Tensor, Tensor, float] | None = None
    # A rectified problem is also begun at the plain solution: its rounds go slowly, and from there none is lost.
    starts = (problem, replace(problem, rectified=False)) if problem.rectified else (problem,)
    for ridge in problem.ridges:
        better = False
        for start in starts:
            found = _sweep(start, seen, sums, ridge)
            if found is None:
                continue
            error = unseen.error(problem, unseen.base + _apply(unseen.inputs, *found))[0]
            if error < before and (best is None or error < best[0]):
                best, better = (error, *found, ridge), True
        if best is not None and not better:
            break  # the error has one minimum over the ridges
    if best is None:
        return None
    # Chosen: now with all rows, those that judged included.
    everything = _Part(problem.inputs, problem.target, problem.base)
    sums = _Sums(moments + _Moments.of(unseen, problem), problem)

    for _ in range(problem.rounds if problem.rectified else 1):
        found = _sweep(problem, everything, sums, best[3], best[1:3])
        if found is None:
            break
        best = (best[0], *found, best[3])
    return Change(best[1], best[2], before / max(whole, 1e-300), best[0] / max(whole, 1e-300), best[3])


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The rows that fit, or those that judge."""

    inputs: Tensor
    target: Tensor
    base: Tensor

    @classmethod
    def of(cls, problem: Problem, rows: Tensor) -> _Part:
        return cls(problem.inputs[rows], problem.target[rows], problem.base[rows])

    def error(self, problem: Problem, found: Tensor) -> tuple[float, float]:
        """Squared error and squared size of the target; behind the ReLU if there is one."""
        target = self.target
        if problem.rectified:
            target, found = target.clamp_min(0), found.clamp_min(0)
        pair = torch.stack(
            [(found - target).square().sum(dtype=torch.float64), target.square().sum(dtype=torch.float64)]
        )
        all_sum(pair)
        return float(pair[0]), float(pair[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Moments:
    """Sums over rows of the inputs and of their products, in float64, over all processes."""

    rows: float
    first: Tensor
    grams: list[Tensor]

    @classmethod
    def of(cls, part: _Part, problem: Problem) -> _Moments:
        inputs = part.inputs
        rows = torch.tensor([float(len(inputs))], dtype=torch.float64, device=inputs.device)
        first = _total(inputs)
        grams = [_product(inputs[:, :, a:b], inputs[:, :, a:b]) for a, b in _blocks(inputs.shape[2], problem.widest)]
        all_sum(rows, first, *grams)
        return cls(float(rows), first, grams)

    def __add__(self, other: _Moments) -> _Moments:
        grams = [a + b for a, b in zip(self.grams, other.grams, strict=True)]
        return _Moments(self.rows + other.rows, self.first + other.first, grams)


class _Sums:
    """The systems to solve; blocks of columns are taken one by one."""

    def __init__(self, moments: _Moments, problem: Problem) -> None:
        self.blocks = _blocks(moments.first.shape[1], problem.widest)
        self.rows = moments.rows
        count = max(1.0, moments.rows)
        mean = moments.first / count * (1.0 if problem.centred else 0.0)
        self.means = [mean[:, a:b] for a, b in self.blocks]
        self.grams = [
            gram / count - m[:, :, None] * m[:, None, :] for gram, m in zip(moments.grams, self.means, strict=True)
        ]
        self.levels = [gram.diagonal(dim1=1, dim2=2).mean(1) for gram in self.grams]
        self._factors: dict[tuple[int, float], Tensor | None] = {}
        self._first: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def factor(self, number: int, ridge: float) -> Tensor | None:
        """Cholesky factor of the damped matrix of a block of columns; None if it is singular."""
        if (number, ridge) not in self._factors:
            tiny = torch.finfo(torch.float64).tiny
            damping = (ridge * self.levels[number]).clamp_min(tiny)[:, None].expand(-1, self.grams[number].shape[1])
            factor, failed = torch.linalg.cholesky_ex(self.grams[number] + torch.diag_embed(damping))
            self._factors[number, ridge] = None if bool(failed.any()) else factor
        return self._factors[number, ridge]

    def cross(
        self, inputs: Tensor, missing: Tensor, number: int, kept: tuple[int, bool] | None
    ) -> tuple[Tensor, Tensor]:
        """Mean products of a block of columns with what is missing, and the mean of that; kept for a fresh start."""
        if kept is not None and kept in self._first:
            return self._first[kept]
        missing = missing.reshape(len(missing), inputs.shape[1], -1)
        cross, first = _product(inputs, missing), _total(missing)
        all_sum(cross, first)
        cross, first = cross / self.rows, first / self.rows
        cross = cross - self.means[number][:, :, None] * first[:, None, :]
        if kept is not None:
            self._first[kept] = cross, first
        return cross, first


def _sweep(
    problem: Problem, seen: _Part, sums: _Sums, ridge: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """One least-squares solution, block of columns by block of columns, from ``start`` or from no change."""
    blocks, width = seen.inputs.shape[1:]
    if start is None:
        outputs = seen.target.shape[1] // blocks
        weight = torch.zeros(blocks, outputs, width, dtype=torch.float64, device=seen.inputs.device)
        bias = torch.zeros(blocks * outputs, dtype=torch.float64, device=seen.inputs.device)
    else:
        weight, bias = start[0].clone(), start[1].clone()
    now = seen.base if start is None else seen.base + _apply(seen.inputs, weight, bias)
    wanted = torch.where(seen.target > 0, seen.target, now.clamp_max(0)) if problem.rectified else seen.target
    for number, (a, b) in enumerate(sums.blocks):
        factor = sums.factor(number, ridge)
        if factor is None:
            return None
        fresh = start is None and number == 0
        if number:
            now = seen.base + _apply(seen.inputs, weight, bias)
        kept = (number, problem.rectified) if fresh else None
        cross, first = sums.cross(seen.inputs[:, :, a:b], wanted - now, number, kept)
        # The ridge pulls the whole change towards zero, not only this round's share of it.
        cross = cross - (ridge * sums.levels[number])[:, None, None] * weight[:, :, a:b].mT
        change = torch.cholesky_solve(cross, factor).mT
        weight[:, :, a:b] += change
        if problem.centred:
            bias += (first - (change @ sums.means[number][:, :, None]).squeeze(2)).flatten()
    return weight, bias


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``Σ_rows left ⊗ right`` per block: ``(rows, blocks, a)`` and ``(rows, blocks, b)`` to ``(blocks, a, b)``."""
    total = torch.zeros(left.shape[1], left.shape[2], right.shape[2], dtype=torch.float64, device=left.device)
    for begin in range(0, len(left), _CHUNK):
        a, b = left[begin : begin + _CHUNK], right[begin : begin + _CHUNK]
        total += (a.permute(1, 2, 0) @ b.permute(1, 0, 2).to(a.dtype)).double()
    return total


def _total(rows: Tensor) -> Tensor:
    """Sum over rows, in float64; short runs are summed in the data's own precision."""
    total = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _CHUNK):
        total += part.sum(0)
    return total


def _apply(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``ΔV u + c`` of every row, in the precision of the rows: ``(rows, blocks · outputs)``."""
    moved = inputs.transpose(0, 1) @ weight.to(inputs.dtype).mT
    return moved.transpose(0, 1).flatten(1) + bias.to(inputs.dtype)


def _blocks(width: int, widest: int) -> list[tuple[int, int]]:
    count = -(-width // widest)
    edges = [round(i * width / count) for i in range(count + 1)]
    return list(pairwise(edges))
