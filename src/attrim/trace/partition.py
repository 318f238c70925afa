"""From units to groups: channels that touch the same axes in the same way, for the same effects, form one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attrim.core.cost import IntArray
from attrim.trace.labels import LabelSpace, Recorder
from attrim.trace.solve import Solution

__all__ = ["Partition", "is_run", "partition"]


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
    occurs = np.zeros(len(units), bool)
    occurs[units] = True
    occurs[0] = False
    alive = np.flatnonzero(occurs)
    dense = np.maximum(np.cumsum(occurs) - 1, 0)[units]
    if not alive.size:
        nothing = np.zeros(0, np.int64)
        return Partition(units, np.full(len(units), -1), np.zeros(len(units), np.int64), nothing, [], nothing)
    signature = _signatures(space, dense, units, book, len(alive))
    causes, by_unit = _effects(book, units, alive)
    _, inverse = np.unique(signature ^ _mix(by_unit.astype(np.uint64)), return_inverse=True)
    order, sizes = _in_network_order(inverse)
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
    space: LabelSpace, dense: IntArray, units: IntArray, book: Recorder, count: int
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A 64-bit digest per unit of (axis, number of positions) over all axes it touches, products and attributes included.

    Every axis has a pseudo-random 64-bit number; a unit's digest is their sum over its positions, modulo 2^64.
    """
    vectors: list[IntArray] = [np.arange(s, s + n) for s, n in zip(space.start, space.size, strict=True)]
    vectors += _computed([f for term in book.costs for f in term.factors] + [note.vector for note in book.rules])
    lengths = [len(v) for v in vectors]
    labels = np.concatenate(vectors)
    number = _mix(np.arange(1, len(vectors) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    signature = np.zeros(count, np.uint64)
    np.add.at(signature, dense[labels], np.where(units[labels] > 0, np.repeat(number, lengths), np.uint64(0)))
    return signature


def _mix(x: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _computed(vectors: Sequence[IntArray]) -> list[IntArray]:
    """Vectors that are not simply an axis of a tensor, each once."""
    unique = {id(v): v for v in vectors}
    return [v for v in unique.values() if not is_run(v)]


def is_run(vector: IntArray) -> bool:
    """Whether these are consecutive labels, as those of a tensor's axis are."""
    ends = vector[0] > 0 and vector[-1] - vector[0] == len(vector) - 1  # most vectors fail here already
    return bool(ends and (np.diff(vector) == 1).all())


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
