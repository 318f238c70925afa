"""The fit: a ridge regression towards the weights that are there, judged on rows that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import torch
from torch import Tensor

from attrim.recover.refit.sums import Moments, Part, blocks_of

__all__ = ["RIDGES", "Change", "Problem", "fit"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as fractions of the mean square (or variance) of the inputs."""
_THIN, _MANY, _REACH = 2, 32, 1.7
"""The rounds before the last read every other row, if there are so many rows for each unknown, and go further than
their solution: where targets follow what is found, each round makes up only a part of the way."""


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
        rounds: fits in a row of a rectified problem, once the ridge is chosen; the last one reads all rows.
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
        moments: of the inputs of all rows.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float
    ridge: float
    moments: Moments


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
    everything = Part(problem.inputs, problem.target, problem.base)
    seen, held = everything.of(~problem.held), everything.of(problem.held)
    moments = Moments.of(seen.inputs, problem.widest)
    before, whole = held.error(None, problem.rectified)
    if moments.rows < 1 or before <= 1e-12 * whole:
        return None
    best = _choose(problem, seen, held, _Systems(moments, problem), before)
    if best is None:
        return None
    # Chosen: now with all rows, those that judged included.
    moments = moments + Moments.of(held.inputs, problem.widest)
    systems = _Systems(moments, problem)
    found = best[1:3]
    for rows, reach in _rounds(problem, everything, moments.rows):
        after = _sweep(problem.rectified, rows, systems, best[3], found)
        if after is None:
            break
        found = found[0].lerp(after[0], reach), found[1].lerp(after[1], reach)
    return Change(*found, before / max(whole, 1e-300), best[0] / max(whole, 1e-300), best[3], moments)


def _rounds(problem: Problem, everything: Part, rows: float) -> list[tuple[Part, float]]:
    """The rows of each of the last fits, and how far to go towards its solution; ``rows`` over all processes."""
    if not problem.rectified:
        return [(everything, 1.0)]
    some = everything[::_THIN] if rows >= _MANY * problem.inputs.shape[2] else everything
    return [(some, _REACH)] * (problem.rounds - 1) + [(everything, 1.0)]


_Best: TypeAlias = tuple[float, Tensor, Tensor, float]


def _choose(problem: Problem, seen: Part, held: Part, systems: _Systems, before: float) -> _Best | None:
    """Error on the held rows, change and ridge of the best fit to the others; None if none is below ``before``."""
    best: _Best | None = None
    # A rectified problem is also begun at the plain solution: its rounds go slowly, and from there none is lost.
    starts = (True, False) if problem.rectified else (False,)

    def better(number: int) -> bool:
        nonlocal best
        last, ridge = best, problem.ridges[number]
        for rectified in starts:
            found = _sweep(rectified, seen, systems, ridge)
            error = before if found is None else held.error(found, problem.rectified)[0]
            if found is not None and error < (before if best is None else best[0]):
                best = (error, *found, ridge)
        return best is not last

    # The error has one minimum over the ridges: from the middle down, or else up.
    middle = len(problem.ridges) // 2
    better(middle)
    down = list(takewhile(better, range(middle - 1, -1, -1)))
    if not down:
        for number in range(middle + 1, len(problem.ridges)):
            if not better(number) and best is not None:
                break
    return best


class _Systems:
    """The systems to solve; blocks of columns are taken one by one."""

    def __init__(self, moments: Moments, problem: Problem) -> None:
        width = moments.first.shape[1]
        self.blocks = blocks_of(width, problem.widest)
        self.centred = problem.centred
        count = max(1.0, moments.rows)
        mean = moments.first / count * (1.0 if problem.centred else 0.0)
        self.means = [mean[:, a:b] for a, b in self.blocks]
        self.grams = [
            gram / count - m[:, :, None] * m[:, None, :] for gram, m in zip(moments.grams, self.means, strict=True)
        ]
        self.levels = [gram.diagonal(dim1=1, dim2=2).mean(1) for gram in self.grams]
        self._factors: dict[tuple[int, float], Tensor | None] = {}
        self._first: dict[bool, tuple[Tensor, Tensor]] = {}

    def factor(self, number: int, ridge: float) -> Tensor | None:
        """Cholesky factor of the damped matrix of a block of columns; None if it is singular."""
        if (number, ridge) not in self._factors:
            tiny = torch.finfo(torch.float64).tiny
            damping = (ridge * self.levels[number]).clamp_min(tiny)[:, None].expand(-1, self.grams[number].shape[1])
            factor, failed = torch.linalg.cholesky_ex(self.grams[number] + torch.diag_embed(damping))
            self._factors[number, ridge] = None if bool(failed.any()) else factor
        return self._factors[number, ridge]

    def cross(
        self, part: Part, change: tuple[Tensor, Tensor] | None, number: int, rectified: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean products of a block of columns with what is missing, and the mean of that; kept for a fresh start."""
        if change is None and rectified in self._first:
            return self._first[rectified]
        rows, cross, first = part.missing(change, rectified, slice(*self.blocks[number]))
        cross, first = cross / max(1.0, rows), first / max(1.0, rows)
        cross -= self.means[number][:, :, None] * first[:, None, :]
        if change is None:
            self._first[rectified] = cross, first
        return cross, first


def _sweep(
    rectified: bool, part: Part, systems: _Systems, ridge: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """One least-squares solution, block of columns by block of columns, from ``start`` or from no change."""
    blocks, width = part.inputs.shape[1:]
    outputs = part.base.shape[1] // blocks
    if start is None:
        weight = torch.zeros(blocks, outputs, width, dtype=torch.float64, device=part.inputs.device)
        bias = torch.zeros(blocks * outputs, dtype=torch.float64, device=part.inputs.device)
    else:
        weight, bias = start[0].clone(), start[1].clone()
    for number, (a, b) in enumerate(systems.blocks):
        factor = systems.factor(number, ridge)
        if factor is None:
            return None
        fresh = start is None and number == 0
        cross, first = systems.cross(part, None if fresh else (weight, bias), number, rectified)
        # The ridge pulls the whole change towards zero, not only this round's share of it.
        cross = cross - (ridge * systems.levels[number])[:, None, None] * weight[:, :, a:b].mT
        change = torch.cholesky_solve(cross, factor).mT
        weight[:, :, a:b] += change
        if systems.centred:
            bias += (first - (change @ systems.means[number][:, :, None]).squeeze(2)).flatten()
    return weight, bias
