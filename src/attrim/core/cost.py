"""Cost: multiply-adds and parameters as a compiled function of how many channels each group keeps.

Every tensor axis has a width ``fixed + Σ_g multiplicity_g · kept_g``; every counted operator and every parameter is one
term ``coefficient · Π widths``. Pricing a plan is therefore two small array products and never runs the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from attrim.errors import InputError

__all__ = ["BoolArray", "CostModel", "IntArray", "Kept", "Terms", "WidthTable"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Kept: TypeAlias = Mapping[str, int] | Sequence[int] | IntArray | None


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
        branch: shape ``(T,)``; the innermost branch that takes the term with it, by position in
            :attr:`CostModel.branches`, -1 for a term that always stays. None: all stay.
    """

    coefficient: IntArray
    factors: IntArray
    branch: IntArray | None = None

    def at(self, widths: IntArray) -> IntArray:
        """The value of each term, shape ``(T,)``."""
        values: IntArray = self.coefficient * np.prod(widths[self.factors], axis=1, dtype=np.int64)
        return values

    def stays(self, gone: BoolArray) -> BoolArray:
        """Shape ``(T,)``; which terms are left where the branches ``gone``, shape ``(N,)``, are removed."""
        if self.branch is None or not gone.size:
            return np.ones(len(self.coefficient), bool)
        return ~(gone[self.branch] & (self.branch >= 0))


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
        branches: ids of the residual branches that can be removed whole, in the order of :attr:`Terms.branch`.
        inside: shape ``(N,)``; the smallest branch that contains this one, by position, or -1. Whoever removes a branch
            removes what is inside it.
        group_branch: shape ``(G,)``; the smallest branch with which a group vanishes wholly, by position, or -1.
        rows: axis of a parameter (``layer1.0.conv1.weight:1``) -> its row in :attr:`widths`, for what
            weights read (dimension 1), pinned or not.

    Example:
        >>> channels.cost.macs()                                # the whole network
        >>> channels.cost.macs({"layer1.0.conv1": 8})           # groups that are not named stay whole
        >>> channels.cost.macs(drops=["layer1.1"])              # without a residual branch
    """

    groups: tuple[str, ...]
    sizes: IntArray
    widths: WidthTable
    mac_terms: Terms
    param_terms: Terms
    branches: tuple[str, ...] = ()
    inside: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    group_branch: IntArray | None = None
    rows: Mapping[str, int] = field(default_factory=dict)

    def vector(self, kept: Kept = None) -> IntArray:
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

    def gone(self, drops: Iterable[str] = ()) -> BoolArray:
        """Shape ``(N,)``; which branches are removed with ``drops`` (ids), those inside them included.

        Raises:
            InputError: not the id of a branch; the branches are listed.
        """
        gone = np.zeros(len(self.branches), bool)
        asked = [drops] if isinstance(drops, str) else list(drops)
        for name in asked:
            if name not in self.branches:
                known = ", ".join(self.branches[:8]) + (", …" if len(self.branches) > 8 else "")
                raise InputError(
                    f"'{name}' is not a residual branch that can be removed. "
                    + (f"The branches are: {known}" if known else "This network has none.")
                    + " (channels.branches; channels.table() says why other sums have none)."
                )
            gone[self.branches.index(name)] = True
        for _ in range(len(gone) if gone.any() else 0):
            deeper = gone | (gone[self.inside] & (self.inside >= 0))
            if (deeper == gone).all():
                break
            gone = deeper
        return gone

    def macs(self, kept: Kept = None, drops: Iterable[str] = ()) -> int:
        """Multiply-adds of one forward pass on the example inputs' shape (the batch counts).

        Args:
            kept: channels kept per group; what it says of a group that vanishes with a branch is ignored.
            drops: ids of the residual branches that are removed.
        """
        return self._sum(self.mac_terms, kept, drops)

    def params(self, kept: Kept = None, drops: Iterable[str] = ()) -> int:
        """Number of parameters (buffers not counted); arguments as for :meth:`macs`."""
        return self._sum(self.param_terms, kept, drops)

    def channels(self, kept: Kept = None, drops: Iterable[str] = ()) -> int:
        """Number of prunable channels that are kept; a tied group counts once. Arguments as for :meth:`macs`."""
        vector = self.vector(kept)
        return int(vector[~self._lost(self.gone(drops))].sum())

    def _sum(self, terms: Terms, kept: Kept, drops: Iterable[str]) -> int:
        vector, gone = self.vector(kept), self.gone(drops)
        if not gone.any():
            return int(terms.at(self.widths.at(vector)).sum())
        vector = np.where(self._lost(gone), self.sizes, vector)  # a cut inside a branch that goes is not carried out
        return int((terms.at(self.widths.at(vector)) * terms.stays(gone)).sum())

    def _lost(self, gone: BoolArray) -> BoolArray:
        """Shape ``(G,)``; groups that vanish wholly."""
        if self.group_branch is None or not gone.any():
            return np.zeros(len(self.sizes), bool)
        return np.asarray(gone[self.group_branch] & (self.group_branch >= 0))
