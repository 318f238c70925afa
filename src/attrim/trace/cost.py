"""Compile the counted products of a run, and the parameters, into a cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attrim.core.cost import CostModel, IntArray, Terms, WidthTable
from attrim.modules.names import NamedTensors
from attrim.trace.labels import LabelSpace, Recorder
from attrim.trace.owners import Owners
from attrim.trace.partition import Partition, is_run

__all__ = ["compile_cost", "linear_form"]


def linear_form(vector: IntArray, parts: Partition) -> tuple[int, list[tuple[int, int]]]:
    """Surviving positions of a label vector as ``fixed + Σ multiplicity · kept``: (fixed, [(group, multiplicity)])."""
    counts = np.bincount(parts.group_of[vector] + 1, minlength=1)
    groups = np.flatnonzero(counts[1:])
    return int(counts[0]), [(int(g), int(counts[g + 1] // parts.sizes[g])) for g in groups]


class _Compiler:
    """Collects widths and terms; width 0 is the constant 1 that pads short products."""

    def __init__(self, parts: Partition) -> None:
        self.parts = parts
        self.fixed: list[int] = [1]
        self.row: list[int] = []
        self.group: list[int] = []
        self.multiplicity: list[int] = []
        self.known: dict[tuple[int, int, int], int | None] = {}
        self.kept_alive: list[IntArray] = []

    def width(self, vector: IntArray, *, always: bool = False) -> int | None:
        """The number of this axis' width; None if it never changes, unless ``always`` asks for it."""
        key = (id(vector), int(vector[0]), len(vector))
        if is_run(vector):
            key = (0, int(vector[0]), len(vector))  # an axis of a tensor: the same under any array object
        else:
            self.kept_alive.append(vector)  # an id is only a name while its array lives
        if key not in self.known:
            fixed, entries = linear_form(vector, self.parts)
            self.known[key] = len(self.fixed) if entries or always else None
            if entries or always:
                for g, count in entries:
                    self.row.append(len(self.fixed))
                    self.group.append(g)
                    self.multiplicity.append(count)
                self.fixed.append(fixed)
        return self.known[key]

    def term(self, coefficient: int, vectors: list[IntArray]) -> tuple[int, list[int]]:
        widths = []
        for vector in vectors:
            width = self.width(vector)
            if width is None:
                coefficient *= len(vector)
            else:
                widths.append(width)
        return coefficient, widths

    def terms(self, items: list[tuple[int, list[int]]], branches: Sequence[int]) -> Terms:
        merged: dict[tuple[int, tuple[int, ...]], int] = {}
        for (coefficient, widths), branch in zip(items, branches, strict=True):
            key = (branch, tuple(sorted(widths)))
            merged[key] = merged.get(key, 0) + coefficient
        longest = max((len(k) for _, k in merged), default=0) or 1
        factors = np.zeros((len(merged), longest), np.int64)
        for i, (_, key_widths) in enumerate(merged):
            factors[i, : len(key_widths)] = key_widths
        branch_of = np.asarray([branch for branch, _ in merged], np.int64)
        return Terms(np.asarray(list(merged.values()), np.int64), factors, branch_of)


def compile_cost(
    named: NamedTensors,
    space: LabelSpace,
    book: Recorder,
    parts: Partition,
    ids: tuple[str, ...],
    known: Owners,
    group_branch: Sequence[int],
) -> CostModel:
    """One term per counted product and per parameter; equal products of the same branch are merged.

    Args:
        known: which operators and tensors go with which branch.
        group_branch: group number -> the branch with which it vanishes, or -1.
    """
    compiler = _Compiler(parts)
    rows: dict[str, int] = {}
    for axis, start, size in zip(space.axes, space.start, space.size, strict=True):
        if axis.dim == 1 and axis.tensor in named.parameters:  # what a layer reads may be chosen, pinned or not
            rows[str(axis)] = len(compiler.fixed)
            compiler.width(np.arange(start, start + size), always=True)
    macs = [compiler.term(term.coefficient, list(term.factors)) for term in book.costs]
    axes: dict[str, list[IntArray]] = {}
    for axis, start, size in zip(space.axes, space.start, space.size, strict=True):
        axes.setdefault(axis.tensor, []).append(np.arange(start, start + size))
    params = []
    for name in sorted(named.parameters):
        vectors = axes.get(name, [])
        rest = named.tensors[name].numel() // math.prod(len(v) for v in vectors) if named.tensors[name].numel() else 0
        params.append(compiler.term(rest, vectors))
    mac_terms = compiler.terms(macs, [known.ops.get(term.op, -1) for term in book.costs])
    param_terms = compiler.terms(params, [known.tensors.get(name, -1) for name in sorted(named.parameters)])
    arrays = [np.asarray(a, np.int64) for a in (compiler.fixed, compiler.row, compiler.group, compiler.multiplicity)]
    return CostModel(
        ids, parts.sizes.astype(np.int64), WidthTable(*arrays), mac_terms, param_terms, known.ids,
        np.asarray(known.inside, np.int64), np.asarray(group_branch, np.int64), rows,
    )  # fmt: skip
