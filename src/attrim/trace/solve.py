"""From ties to units: connected labels are removed together; a unit with one pinned label stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.trace.labels import Recorder

__all__ = ["Solution", "components", "solve"]


def components(total: int, left: IntArray, right: IntArray) -> IntArray:
    """The smallest label connected to each label ``0 … total - 1``, by array-wise hooking and pointer jumping."""
    parent = np.arange(total, dtype=np.int64)
    while True:
        a, b = parent[left], parent[right]
        apart = a != b
        if not apart.any():
            return parent
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            jumped = parent[parent]
            if (jumped == parent).all():
                break
            parent = jumped


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What became of the labels.

    Attributes:
        units: label -> unit (its smallest label), 0 for every label that must stay.
        roots: label -> smallest connected label, pinned or not.
        reasons: root of a pinned component -> the first reason.
    """

    units: IntArray
    roots: IntArray
    reasons: dict[int, Reason]


def solve(book: Recorder, total: int, extra: Iterable[tuple[IntArray, Reason]] = ()) -> Solution:
    """Connect the ties of a run and spread its pins."""
    empty = np.zeros(0, np.int64)
    roots = components(total, np.concatenate([empty, *book.left]), np.concatenate([empty, *book.right]))
    pinned = np.zeros(total, bool)
    pinned[0] = True
    reasons: dict[int, Reason] = {}
    for labels, reason in (*book.pins, *extra):
        new = np.unique(roots[labels])
        for root in new[~pinned[new]].tolist():
            reasons[root] = reason
        pinned[new] = True
    return Solution(np.where(pinned[roots], 0, roots), roots, reasons)
