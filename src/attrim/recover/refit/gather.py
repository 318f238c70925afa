"""What a fit is made of: rows of inputs, of what should be found, and of what is found, from all batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attrim.modules.course.follow import Arrival, Site
from attrim.modules.course.rows import places
from attrim.modules.course.survey import Key, Unit
from attrim.recover.refit.fit import RIDGES, Change, Problem, fit
from attrim.recover.refit.write import write

__all__ = ["Rows", "Sampling", "Settings", "match", "repair"]

_FEWEST = 16384
_MOST = 256
"""Rows for each unknown: never more than this many, whatever the network itself spends on the layer."""

_PLENTY = 128
"""Up to this many rows for each unknown, the products may cost four times what the layer itself costs; above, once."""

_LEAST = 32

_WIDE, _LEAST_WIDE = 576, 8
"""Above this many unknowns the rows for each become fewer, down to the second number: products grow with the square."""

_HELD = 5
"""Every fifth sample judges the fit and takes no part in it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How fits are made; see :func:`attrim.recover.reconstruct`."""

    ridges: tuple[float, ...] = RIDGES
    rectify: bool = True
    widest: int = 4608
    memory: int = 8 << 30
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which output positions are looked at, the same ones in both networks.

    Attributes:
        sizes: samples of each batch.
        seed: of the choice.
        memory: most bytes that the rows of one unit may take.
    """

    sizes: tuple[int, ...]
    seed: int
    memory: int

    def rows(self, unit: Unit, samples: int) -> int:
        """How many positions of a unit are looked at: the products then cost no more than the layer itself.

        Args:
            unit: the unit, in the network whose inputs are read.
            samples: of the batch that was surveyed.
        """
        total = unit.places * sum(self.sizes) // max(1, samples)
        like_layer = total * unit.block_outputs // max(1, unit.columns)
        least = min(_LEAST * unit.columns, max(_LEAST * _WIDE, _LEAST_WIDE * unit.columns))
        if unit.columns <= _WIDE:
            like_layer = max(like_layer, min(4 * like_layer, _PLENTY * unit.columns))
        wanted = max(_FEWEST, min(_MOST * unit.columns, max(least, like_layer)))
        width = 4 * (unit.columns * (unit.outputs // unit.block_outputs) + 3 * unit.outputs)
        return max(64, min(wanted, total, max(self.memory, 1 << 29) // (8 * width)))

    def at(self, ordinal: int, batch: int, rows: int, total: int) -> Tensor:
        """The positions of one batch, of ``total`` that there are."""
        share = -(-rows * self.sizes[batch] // sum(self.sizes))
        return places(total, share, (self.seed * 7_919 + ordinal) * 100_003 + batch).sort().values


@dataclass(slots=True, eq=False)
class Rows:
    """Rows of one unit, collected batch by batch."""

    inputs: list[Tensor] = field(default_factory=list)
    target: list[Tensor] = field(default_factory=list)
    base: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    sample: int = 0

    def add(self, arrival: Arrival, at: Tensor, target: Tensor) -> None:
        """Take in a batch in which the pruned network has come to the comparison."""
        self.put(arrival.inputs(at), arrival.values(at), target, at, arrival)

    def put(self, inputs: Tensor, base: Tensor, target: Tensor, at: Tensor, arrival: Arrival) -> None:
        """Take in the rows of a batch."""
        self.inputs.append(inputs.flatten(2))
        self.base.append(base)
        self.target.append(target.to(base.device))
        numbers = at // arrival.use.outputs
        self.held.append((self.sample + numbers) % _HELD == _HELD - 1)
        self.sample += len(arrival.use.inputs)

    def arranged(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs, targets, what is found now, and which rows judge; those come last, so that both kinds lie together."""
        held = torch.cat(self.held)
        if bool(held.all()) or not bool(held.any()):
            held = torch.arange(len(held), device=held.device) % _HELD == _HELD - 1
        masks = torch.split(held, [len(mask) for mask in self.held])
        inputs, target, base = (_arranged(parts, masks) for parts in (self.inputs, self.target, self.base))
        return inputs, target, base, held.sort().values.to(inputs.device)


def _arranged(parts: list[Tensor], held: Sequence[Tensor]) -> Tensor:
    """Rows of all batches in one tensor, copied once; those that judge come last."""
    arranged = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]))
    begin = 0
    for judging in (False, True):
        for part, mask in zip(parts, held, strict=True):
            at = (mask == judging).nonzero().flatten().to(part.device)
            torch.index_select(part, 0, at, out=arranged[begin : begin + len(at)])
            begin += len(at)
    return arranged


def repair(site: Site, rows: Rows, settings: Settings) -> Change | None:
    """Fit a unit to its rows and write the result; None if it stays as it is."""
    if not rows.inputs:
        return None
    inputs, target, base, held = rows.arranged()
    change = fit(
        Problem(
            inputs,
            target,
            base,
            held,
            centred=site.unit.bias or site.norm is not None,
            rectified=settings.rectify and site.unit.rectified,
            ridges=settings.ridges,
            widest=settings.widest,
        )
    )
    if change is not None:
        write(site, change, inputs)
    return change


def match(dense: Sequence[Unit], pruned: Sequence[Unit]) -> tuple[dict[Key, tuple[Unit, Unit]], dict[str, str]]:
    """Units of both networks that belong together, in the pruned network's order, and why others do not."""
    of_dense = {unit.key: unit for unit in dense}
    pairs, refused = {}, {}
    for unit in pruned:
        other = of_dense.get(unit.key)
        if other is None or (other.steps, other.join, other.flipped) != (unit.steps, unit.join, unit.flipped):
            refused[unit.key[0]] = "the pruned network takes another course there"
        else:
            pairs[unit.key] = other, unit
    return pairs, refused
