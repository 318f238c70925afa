"""What a survey of a network's course tells: contractions that can be fitted, and why others cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Course", "Key", "Unit"]

Key: TypeAlias = tuple[str, int]
"""A weight and the number of its part: packed projections use one part a call."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A contraction whose weight can be fitted, and where its output is compared.

    Attributes:
        key: the weight and its part.
        offset: where in the weight's storage the part begins.
        dim: the dimension of the weight that is contracted.
        steps: number of operators (movements, affine maps) between the contraction and the comparison.
        join: whether the comparison takes place behind a sum with another branch.
        rectified: whether a ReLU follows at once, so that values below zero need not be met.
        flipped: whether the weight is the left factor of a matrix product.
        outputs: rows of the weight over all blocks.
        block_outputs: rows of one block.
        columns: columns · taps of one block: unknowns of one output.
        places: output positions per batch of the survey.
        bias: whether the contraction has a bias that nothing else uses, or the first thing that follows adds one.
        norm: number of the step that is a batch norm that can take up a bias, or -1.
        live: bytes of activations that were alive at the comparison, the contraction's inputs included.
    """

    key: Key
    offset: int
    dim: int
    steps: int
    join: bool
    rectified: bool
    flipped: bool
    outputs: int
    block_outputs: int
    columns: int
    places: int
    bias: bool
    norm: int
    live: int = 0

    @property
    def inputs(self) -> int:
        """Columns · taps of all blocks together."""
        return self.columns * (self.outputs // self.block_outputs)


@dataclass(frozen=True, slots=True)
class Course:
    """What a survey found.

    Attributes:
        units: in the order in which their outputs are compared.
        refused: weight -> why it cannot be fitted.
        contracted: weight -> its dimensions that were contracted, of those that can and those that cannot be fitted.
        added: parameters that were only added or joined to something, such as position embeddings.
    """

    units: tuple[Unit, ...]
    refused: Mapping[str, str]
    contracted: Mapping[str, frozenset[int]]
    added: frozenset[str]

    def left_out(self, cut: Mapping[str, Collection[int]]) -> dict[str, str]:
        """Weights whose inputs were cut and that are no unit, with the reason.

        Args:
            cut: weight -> its dimensions that are cut.
        """
        units = {unit.key[0] for unit in self.units}
        left = {}
        for name, dims in cut.items():
            if name in self.contracted:
                if name not in units and self.contracted[name] & set(dims):
                    left[name] = self.refused[name]
            elif any(d != 0 for d in dims) and name not in self.added:  # most weights have their outputs first
                left[name] = "no convolution or matrix product was seen with it"
        return left
