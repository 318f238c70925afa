"""From units to groups: channels that touch the same axes in the same way, for the same effects, form one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attrim.core.cost import IntArray
from attrim.trace.labels import LabelSpace, Recorder
from attrim.trace.solve import Solution

__all__ = ["Partition", "partition"]


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Groups of units.

    Attributes:
        units: label -> unit, 0 for labels that stay (also those of groups of one channel).
        group_of: label -> group number, -1 for labels that stay.
        channel_of: label -> channel within its group.
        sizes: group number -> channels.
        effects: group number -> causes of inexactness.
        lonely: labels of groups with a single channel, which can never lose it.
    """

    units: IntArray
    group_of: IntArray
    channel_of: IntArray
    sizes: IntArray
    effects: list[tuple[str, ...]]
    lonely: IntArray


def partition(space: LabelSpace, solution: Solution, book: Recorder) -> Partition:
    """Group the units of a solved run."""
    units = solution.units
    alive = np.unique(units[units > 0])
    if not alive.size:
        nothing = np.zeros(0, np.int64)
        return Partition(units, np.full(len(units), -1), np.zeros(len(units), np.int64), nothing, [], nothing)
    signature = _signatures(space, units, book, alive)
    causes, by_unit = _effects(book, units, alive)
    _, inverse = np.unique(np.stack([signature, by_unit.astype(np.uint64)]), axis=1, return_inverse=True)
    order, sizes = _in_network_order(inverse.ravel())
    dense = np.searchsorted(alive, units)
    dense[units == 0] = 0
    single = sizes[order][dense] == 1
    lonely = np.flatnonzero(single & (units > 0))
    keep = sizes > 1
    renumber = np.cumsum(keep) - 1
    group_of = np.where((units > 0) & ~single, renumber[order][dense], -1)
    position = np.argsort(np.argsort(order, kind="stable"), kind="stable")
    start = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    channel = position - start[order]
    masks = np.zeros(len(sizes), np.int64)
    masks[order] = by_unit
    effects = [causes_of(causes, mask) for mask in masks[keep].tolist()]
    clean = np.where(group_of >= 0, units, 0)
    return Partition(clean, group_of, channel[dense], sizes[keep], effects, lonely)


def _signatures(
    space: LabelSpace, units: IntArray, book: Recorder, alive: IntArray
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A 64-bit digest per unit of (axis, number of positions) over all axes it touches, products and attributes included."""
    vectors: list[IntArray] = [np.arange(s, s + n) for s, n in zip(space.start, space.size, strict=True)]
    vectors += _computed([f for term in book.costs for f in term.factors] + [note.vector for note in book.rules])
    axis = np.repeat(np.arange(len(vectors)), [len(v) for v in vectors])
    touched = units[np.concatenate(vectors)]
    mask = touched > 0
    keys, counts = np.unique(np.searchsorted(alive, touched[mask]) * len(vectors) + axis[mask], return_counts=True)
    digest = _mix((keys % len(vectors)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.astype(np.uint64))
    signature = np.zeros(len(alive), np.uint64)
    np.add.at(signature, keys // len(vectors), digest)
    return signature


def _mix(x: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _computed(vectors: Sequence[IntArray]) -> list[IntArray]:
    """Vectors that are not simply an axis of a tensor, each once."""
    unique = {id(v): v for v in vectors}
    return [v for v in unique.values() if v[0] == 0 or v[-1] - v[0] != len(v) - 1]


def _effects(book: Recorder, units: IntArray, alive: IntArray) -> tuple[list[str], IntArray]:
    """The causes that occur, and per unit a bit mask of them."""
    causes = sorted({text for _, text in book.effects})
    masks = np.zeros(len(alive), np.int64)
    for labels, text in book.effects:
        hit = np.unique(units[labels])
        hit = hit[hit > 0]
        masks[np.searchsorted(alive, hit)] |= 1 << causes.index(text)
    return causes, masks


def causes_of(causes: Sequence[str], mask: int) -> tuple[str, ...]:
    """The causes whose bits are set."""
    return tuple(text for i, text in enumerate(causes) if mask >> i & 1)


def _in_network_order(inverse: IntArray) -> tuple[IntArray, IntArray]:
    """Renumber group ids by first appearance; returns per unit its group, and the sizes."""
    first = np.unique(inverse, return_index=True)[1]
    rank = np.argsort(np.argsort(first))
    order = rank[inverse]
    return order, np.bincount(order)
