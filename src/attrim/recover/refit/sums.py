"""Sums over rows: products of inputs, what is missing, and errors; in tiles of rows, added up in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attrim.modules.distributed import all_sum

__all__ = ["Moments", "Part", "blocks_of", "gram", "moved"]

_CHUNK = 8192
"""Rows whose products are summed in the data's own precision before they go into the float64 sums."""

_STRIPE = 256
"""Columns of a Gram matrix that are computed at once, from the diagonal down."""

_TILE, _FEWEST = 1 << 19, 1024
"""Numbers of a tile of outputs, so that what is done to it one after the other stays in the cache; its fewest rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some rows of a regression.

    Attributes:
        inputs: ``(rows, blocks, width)``.
        target, base: ``(rows, blocks · outputs)``: what should be found, and what is found without a change.
    """

    inputs: Tensor
    target: Tensor
    base: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def of(self, rows: Tensor) -> Part:
        """The rows of a mask: views where they lie together, else copies."""
        at = rows.nonzero().flatten()
        if len(at) and int(at[-1] - at[0]) == len(at) - 1:
            return self[int(at[0]) : int(at[-1]) + 1]
        return Part(self.inputs[at], self.target[at], self.base[at])

    def __getitem__(self, rows: slice) -> Part:
        return Part(self.inputs[rows], self.target[rows], self.base[rows])

    def tiles(self) -> Iterator[Part]:
        """All rows, some at a time."""
        step = max(_FEWEST, min(_CHUNK, _TILE // max(1, self.base.shape[1])))
        return (self[begin : begin + step] for begin in range(0, len(self), step))

    def error(self, change: tuple[Tensor, Tensor] | None, rectified: bool) -> tuple[float, float]:
        """Squared error after a change, and squared size of the target, over all processes; behind the ReLU if there
        is one."""
        pair = torch.zeros(2, dtype=torch.float64, device=self.base.device)
        change = self._own(change)
        for tile in self.tiles():
            target, found = tile.target, tile._found(change)
            if rectified:
                target, found = target.clamp_min(0), found.clamp_min(0)
            pair[0] += (found - target).square_().sum()
            pair[1] += target.square().sum()
        all_sum(pair)
        return float(pair[0]), float(pair[1])

    def missing(
        self, change: tuple[Tensor, Tensor] | None, rectified: bool, columns: slice
    ) -> tuple[float, Tensor, Tensor]:
        """Rows, ``Σ inputs ⊗ missing`` of some columns and ``Σ missing``, over all processes.

        Returns:
            The number of rows, ``(blocks, columns, outputs)`` and ``(blocks, outputs)``.
        """
        inputs = self.inputs[:, :, columns]
        blocks, outputs = inputs.shape[1], self.base.shape[1] // inputs.shape[1]
        cross = torch.zeros(blocks, inputs.shape[2], outputs, dtype=torch.float64, device=inputs.device)
        first = torch.zeros(blocks, outputs, dtype=torch.float64, device=inputs.device)
        change = self._own(change)
        for tile in self.tiles():
            gap = _gap(tile.target, tile._found(change), rectified).view(len(tile), blocks, outputs)
            cross += tile.inputs[:, :, columns].permute(1, 2, 0) @ gap.transpose(0, 1).to(inputs.dtype)
            first += gap.sum(0)
        rows = torch.tensor([float(len(self))], dtype=torch.float64, device=inputs.device)
        all_sum(rows, cross, first)
        return float(rows), cross, first

    def _own(self, change: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The change in the precision of the rows."""
        return None if change is None else (change[0].to(self.inputs.dtype), change[1].to(self.inputs.dtype))

    def _found(self, change: tuple[Tensor, Tensor] | None) -> Tensor:
        """What is found after a change."""
        return self.base if change is None else moved(self.inputs, change[0]).add_(change[1]) + self.base


def _gap(target: Tensor, found: Tensor, rectified: bool) -> Tensor:
    """What is missing; where the target is below zero, only what is found above zero is wrong."""
    if not rectified:
        return target - found
    return torch.where(target > 0, target - found, found.clamp_min(0).neg_())


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over rows of the inputs and of their products, in float64, over all processes.

    Attributes:
        rows: how many.
        first: ``(blocks, width)``.
        grams: ``(blocks, columns, columns)`` of each block of columns.
    """

    rows: float
    first: Tensor
    grams: list[Tensor]

    @classmethod
    def of(cls, inputs: Tensor, widest: int) -> Moments:
        """Of rows ``(rows, blocks, width)``; at most ``widest`` columns make a matrix."""
        rows = torch.tensor([float(len(inputs))], dtype=torch.float64, device=inputs.device)
        first = torch.zeros(inputs.shape[1:], dtype=torch.float64, device=inputs.device)
        for part in torch.split(inputs, _CHUNK):
            first += part.sum(0)
        grams = [gram(inputs[:, :, a:b]) for a, b in blocks_of(inputs.shape[2], widest)]
        all_sum(rows, first, *grams)
        return cls(float(rows), first, grams)

    def __add__(self, other: Moments) -> Moments:
        grams = [a + b for a, b in zip(self.grams, other.grams, strict=True)]
        return Moments(self.rows + other.rows, self.first + other.first, grams)

    def outputs(self, weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and mean square of ``W u``, each ``(blocks · outputs,)``, float64.

        Args:
            weight: ``(blocks, outputs, width)``.
            inputs: the rows, read if the matrix of all columns is not there.
        """
        wide = weight.double()
        mean = (wide @ self.first[:, :, None]).flatten() / self.rows
        if len(self.grams) == 1:
            return mean, ((wide @ self.grams[0]) * wide).sum(2).flatten() / self.rows
        square = torch.zeros_like(mean)
        for part in torch.split(inputs, _FEWEST):
            square += moved(part, weight.to(inputs.dtype)).square_().sum(0)
        all_sum(square)
        return mean, square / self.rows


def gram(inputs: Tensor) -> Tensor:
    """``Σ_rows u ⊗ u`` per block: ``(rows, blocks, width)`` to ``(blocks, width, width)``, float64.

    It is symmetric: only what lies on and below the diagonal is computed, in stripes of columns.
    """
    blocks, width = inputs.shape[1:]
    total = torch.zeros(blocks, width, width, dtype=torch.float64, device=inputs.device)
    for part in torch.split(inputs, _CHUNK):
        for a in range(0, width, _STRIPE):
            b = min(a + _STRIPE, width)
            total[:, a:, a:b] += part[:, :, a:].permute(1, 2, 0) @ part[:, :, a:b].transpose(0, 1)
    return total.tril() + total.tril(-1).mT


def moved(inputs: Tensor, weight: Tensor) -> Tensor:
    """``W u`` of every row: ``(rows, blocks · outputs)``."""
    return (inputs.transpose(0, 1) @ weight.mT).transpose(0, 1).flatten(1)


def blocks_of(width: int, widest: int) -> list[tuple[int, int]]:
    """Edges of blocks of at most ``widest`` columns, nearly equal."""
    count = -(-width // widest)
    edges = [round(i * width / count) for i in range(count + 1)]
    return list(pairwise(edges))
