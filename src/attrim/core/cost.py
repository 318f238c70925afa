"""Cost: multiply-adds and parameters as a compiled function of how many channels each group keeps.

Every tensor axis has a width ``fixed + Σ_g multiplicity_g · kept_g``; every counted operator and every parameter is one
term ``coefficient · Π widths``. Pricing a plan is therefore two small array products and never runs the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attrim.errors import InputError

__all__ = ["CostModel", "IntArray", "Terms", "WidthTable"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class WidthTable:
    """Widths of axes as linear forms in the kept counts, in compressed rows.

    Attributes:
        fixed: shape ``(W,)``; positions that never go.
        row: shape ``(nnz,)``; which width an entry belongs to.
        group: shape ``(nnz,)``; which group (by position in :attr:`CostModel.groups`).
        multiplicity: shape ``(nnz,)``; positions per channel of that group.
    """

    fixed: IntArray
    row: IntArray
    group: IntArray
    multiplicity: IntArray

    def at(self, kept: IntArray) -> IntArray:
        """Widths for kept counts of shape ``(G,)``; returns shape ``(W,)``."""
        widths = self.fixed.copy()
        np.add.at(widths, self.row, self.multiplicity * kept[self.group])
        return widths


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """A sum of products of widths: ``Σ_t coefficient_t · Π_k widths[factors_{t,k}]``.

    Attributes:
        coefficient: shape ``(T,)``.
        factors: shape ``(T, K)``; indices into the width table, padded with the index of a width that is always 1.
    """

    coefficient: IntArray
    factors: IntArray

    def at(self, widths: IntArray) -> IntArray:
        """The value of each term, shape ``(T,)``."""
        values: IntArray = self.coefficient * np.prod(widths[self.factors], axis=1, dtype=np.int64)
        return values


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """MACs and parameters of a network as a function of the channels kept per group.

    1 MAC is one multiply-add of a convolution, linear layer, matrix product or attention product; norms, activations,
    pooling and biases count nothing. ``2 * macs`` is what ``torch.utils.flop_counter`` counts for the same inputs.

    Attributes:
        groups: group ids, in the order of every ``kept`` vector.
        sizes: shape ``(G,)``; channels of each group.
        widths: the axes' widths.
        mac_terms: one term per counted operator call.
        param_terms: one term per parameter (tied parameters once).

    Example:
        >>> channels.cost.macs()                         # the whole network
        >>> channels.cost.macs({"layer1.0.conv1": 8})    # groups that are not named stay whole
    """

    groups: tuple[str, ...]
    sizes: IntArray
    widths: WidthTable
    mac_terms: Terms
    param_terms: Terms

    def vector(self, kept: Mapping[str, int] | Sequence[int] | IntArray | None = None) -> IntArray:
        """Kept counts as an array of shape ``(G,)``; groups that a mapping does not name stay whole."""
        if kept is None:
            return self.sizes
        if isinstance(kept, Mapping):
            known = {name: i for i, name in enumerate(self.groups)}
            vector = self.sizes.copy()
            for name, count in kept.items():
                if name not in known:
                    raise InputError(f"unknown group '{name}'. The groups are: {', '.join(self.groups[:8])}, …")
                vector[known[name]] = count
        else:
            vector = np.asarray(kept, dtype=np.int64)
            if vector.shape != self.sizes.shape:
                raise InputError(f"expected {len(self.sizes)} kept counts, one per group, found shape {vector.shape}.")
        if (vector < 0).any() or (vector > self.sizes).any():
            worst = int(np.argmax((vector < 0) | (vector > self.sizes)))
            raise InputError(
                f"group '{self.groups[worst]}' has {self.sizes[worst]} channels; keeping {vector[worst]} is impossible."
            )
        return vector

    def macs(self, kept: Mapping[str, int] | Sequence[int] | IntArray | None = None) -> int:
        """Multiply-adds of one forward pass on the example inputs' shape (the batch counts)."""
        return int(self.mac_terms.at(self.widths.at(self.vector(kept))).sum())

    def params(self, kept: Mapping[str, int] | Sequence[int] | IntArray | None = None) -> int:
        """Number of parameters (buffers not counted)."""
        return int(self.param_terms.at(self.widths.at(self.vector(kept))).sum())

    def channels(self, kept: Mapping[str, int] | Sequence[int] | IntArray | None = None) -> int:
        """Number of prunable channels that are kept; a tied group counts once."""
        return int(self.vector(kept).sum())
