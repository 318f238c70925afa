"""Operators that carry sizes: views, expansions, slices, splits.

A size may be computed from the tensor (then it follows a cut), read from an attribute (then the attribute is repaired) or
written as a constant (then the channels stay). The run cannot tell which, so each such place is a *site* with options in
order of preference; the probe moves a site on when the pruned network goes astray there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.labels import Value
from attrim.trace.tracer import HEAD_COUNTS, Option, Tracer

__all__ = ["RULES", "place"]

Table = tuple[IntArray, tuple[int, ...]]
"""Labels over some axes of an output, and which axes."""

_CONSTANT = "the size is written as a constant or follows another tensor"


def place(t: Tracer, call: Call, value: Value, out: Tensor, tables: Sequence[Table]) -> None:
    """Give ``out`` the labels of ``tables``; labels that vary along several axes are tied until they vary along one."""
    axes: list[IntArray | None] = [None] * out.ndim
    was_split = False
    for labels, dims in sorted(tables, key=lambda table: not _varying(table[0])):
        varying = _varying(labels)
        guided = [d for d in t.guided_axes(out.ndim) if axes[d] is None] if not varying else []
        if guided:  # one survivor: its label may sit on any axis; the recorded run knows which
            dim = next((d for d in guided if d in dims), guided[0])
            vector: IntArray | None = np.full(out.shape[dim], labels.flat[0])
        elif len(varying) > 1:
            dim, vector = _split(t, call, labels, dims, varying)
            was_split = True
        else:
            dim, vector = _whole(t, labels, dims, varying)
        if vector is None:
            continue
        if axes[dim] is not None:
            t.pin(vector, "two channel axes are merged into one")
            t.pin(axes[dim], "two channel axes are merged into one")
        else:
            axes[dim] = vector
    if not was_split and any(v is not None for v in axes):
        axes = _sized(t, call, axes)
    t.set(out, axes, value.live, value.constant)


def _varying(labels: IntArray) -> list[int]:
    """The axes along which labels differ."""
    return [k for k in range(labels.ndim) if labels.shape[k] > 1 and (labels != labels.take([0], axis=k)).any()]


def _whole(t: Tracer, labels: IntArray, dims: tuple[int, ...], varying: list[int]) -> tuple[int, IntArray | None]:
    """Labels that vary along one axis at most."""
    if varying:
        axis = varying[0]
    else:
        wide = [k for k in range(labels.ndim) if labels.shape[k] > 1]
        if len(wide) > 1:
            t.pin(labels.ravel()[:1], "a single channel is spread over several axes")
            return 0, None
        axis = wide[0] if wide else 0
    index = tuple(slice(None) if k == axis else 0 for k in range(labels.ndim))
    return dims[axis], np.ascontiguousarray(labels[index])


def _split(
    t: Tracer, call: Call, labels: IntArray, dims: tuple[int, ...], varying: list[int]
) -> tuple[int, IntArray | None]:
    """An axis was split in several: keep one factor prunable and tie the others to it."""

    def keep(axis: int, attribute: str | None = None) -> Option:
        def action() -> tuple[int, IntArray | None]:
            vector = t.merge(labels, axis)
            if attribute is not None:
                for found in t.attributes(labels.shape[axis], (attribute,))[:1]:
                    t.follow(found, vector)
            return dims[axis], vector

        return Option(f"keep factor {axis}" + (f" and {attribute}" if attribute else ""), action)

    def stay() -> tuple[int, IntArray | None]:
        t.pin(labels.ravel(), f"an axis is split into {tuple(labels.shape)} and {_CONSTANT}")
        return 0, None

    options = [
        keep(axis, head.name)
        for axis in (*reversed(varying[:-1]), varying[-1])
        for head in t.attributes(labels.shape[axis], HEAD_COUNTS)[:1]
    ]
    flat = call.inputs[0].ndim == 2  # a flat vector becomes maps: channels come first
    by_size = (
        varying
        if flat
        else sorted(varying, key=lambda k: (labels.shape[k] == labels.shape[varying[0]] and k != varying[-1], -k))
    )
    if call.name.startswith("pixel") or call.name == "im2col":
        by_size = sorted(varying, key=lambda k: k)
    options += [keep(axis) for axis in by_size]
    options += _coupled(t, labels, dims, by_size)
    for axis in varying:
        options += [keep(axis, a.name) for a in t.attributes(labels.shape[axis]) if a.name not in HEAD_COUNTS]
    options.append(Option("pin", stay))
    chosen: tuple[int, IntArray | None] = t.decide("split", options)
    return chosen


def _coupled(t: Tracer, labels: IntArray, dims: tuple[int, ...], axes: Sequence[int]) -> list[Option]:
    """``reshape(b, n, 3, heads, c // heads)`` with ``c`` the width of the module's input: both widths shrink together.

    The input's channel (h, d) goes with the split axis' (h, d), the same d in every head, so that ``c // heads`` stays true.
    """
    options = []
    for axis in axes:
        inner = [k for k in range(labels.ndim) if labels.shape[k] > 1 and k <= axis]
        size = 1
        for first in reversed(inner):
            size *= labels.shape[first]
            widths = t.module_widths(size) if first != axis else []
            if widths:
                options += [_couple(t, labels, dims, axis, width) for width in widths[:3]]
                break
    return options


def _couple(t: Tracer, labels: IntArray, dims: tuple[int, ...], axis: int, width: IntArray) -> Option:
    def action() -> tuple[int, IntArray | None]:
        vector = t.merge(labels, axis)
        t.tie(t.merge(width.reshape(-1, labels.shape[axis]), 1), vector)
        return dims[axis], vector

    return Option(f"keep factor {axis} with the input's width", action)


def _sized(t: Tracer, call: Call, axes: list[IntArray | None]) -> list[IntArray | None]:
    """The labelled sizes of the result: free, stated by an attribute, or constant."""
    labelled = [(d, v) for d, v in enumerate(axes) if v is not None]
    choices = [t.attributes(len(v)) for _, v in labelled]

    def follow(k: int) -> Option:
        def action() -> list[IntArray | None]:
            for (_, vector), found in zip(labelled, choices, strict=True):
                if found:
                    t.follow(found[min(k, len(found) - 1)], vector)
            return axes

        return Option("follow an attribute", action)

    def stay() -> list[IntArray | None]:
        for _, vector in labelled:
            t.pin(vector, _CONSTANT)
        return [None] * len(axes)

    options = [Option("free", lambda: axes)]
    options += [follow(k) for k in range(max(map(len, choices), default=0))]
    options.append(Option("pin", stay))
    decided: list[IntArray | None] = t.decide("size", options)
    return decided


def slice_(t: Tracer, call: Call) -> None:
    """x[:, a:b]."""
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    dim = (call["dim"] or 0) % x.ndim
    axes = list(value.axes)
    vector = axes[dim]
    if vector is not None:
        size, step = len(vector), call["step"] or 1
        start, end, _ = slice(call["start"], call["end"]).indices(size)
        if start > 0 or end < size or step > 1:
            axes[dim] = _slice(t, vector, start, max(start, end), step)
    t.set(out, axes, value.live, value.constant)


def _slice(t: Tracer, vector: IntArray, start: int, end: int, step: int) -> IntArray | None:
    size = len(vector)
    part = np.ascontiguousarray(vector[start:end:step])
    bounds = [b for b in (start, end) if 0 < b < size]
    piece = math.gcd(size, *bounds) if bounds else size

    def attribute(k: int) -> Option:
        def action() -> IntArray:
            for bound in bounds:
                found = t.attributes(bound)
                if found:
                    t.follow(found[min(k, len(found) - 1)], vector[:bound])
            return part

        return Option("the bound follows an attribute", action)

    def even() -> IntArray:
        t.merge(vector.reshape(-1, piece), 1)
        return part

    def prefix() -> IntArray:
        t.pin(vector[: max(bounds)], "sliced at a constant position")
        return part

    def suffix() -> IntArray:
        t.pin(vector[min(bounds) :], "sliced at a constant position from the end")
        return part

    def stay() -> None:
        t.pin(vector, f"sliced at constant positions [{start}:{end}:{step}]")

    options = [Option("free", lambda: part)]
    options += [attribute(k) for k in range(max((len(t.attributes(b)) for b in bounds), default=0))]
    options += [Option("even pieces", even)] if bounds and size // piece <= 4 else []
    options += [Option("pin the prefix", prefix), Option("pin the suffix", suffix)] if bounds and step == 1 else []
    options.append(Option("pin", stay))
    chosen: IntArray | None = t.decide("slice", options, (start, end))
    return chosen


def split(t: Tracer, call: Call) -> None:
    """split, chunk, split_with_sizes: pieces of an axis; equal pieces may have to stay equal."""
    x = call.inputs[0]
    value = t.value(x)
    dim = (call["dim"] or 0) % x.ndim
    outs = call.outputs
    vector = value.axes[dim]
    pieces: Sequence[IntArray | None] = [None] * len(outs)
    if vector is not None:
        bounds = np.cumsum([o.shape[dim] for o in outs])[:-1]
        pieces = _split_pieces(t, [np.ascontiguousarray(p) for p in np.split(vector, bounds)])
    for out, piece in zip(outs, pieces, strict=True):
        t.set(out, [piece if d == dim else v for d, v in enumerate(value.axes)], value.live, value.constant)


def _split_pieces(t: Tracer, pieces: list[IntArray]) -> Sequence[IntArray | None]:
    sizes = [len(p) for p in pieces]
    choices = {n: t.attributes(n) for n in set(sizes)}

    def tied() -> list[IntArray]:
        for n in set(sizes):
            same = [p for p in pieces if len(p) == n]
            for other in same[1:]:
                t.tie(same[0], other, "pieces of one split must stay equally wide")
        return pieces

    def attribute(k: int) -> Option:
        def action() -> list[IntArray]:
            used: dict[str, IntArray] = {}
            for n, piece in zip(sizes, pieces, strict=True):
                free = [a for a in choices[n] if a.name not in used] or choices[n]
                if not free:
                    continue
                chosen = free[min(k, len(free) - 1)]
                if chosen.name in used:
                    t.tie(used[chosen.name], piece, "two pieces of a split read the same attribute")
                used[chosen.name] = piece
                t.follow(chosen, piece)
            return pieces

        return Option("sizes follow attributes", action)

    def stay() -> Sequence[None]:
        for piece in pieces:
            t.pin(piece, f"split into constant sizes {sizes}")
        return [None] * len(pieces)

    options = [Option("free", lambda: pieces)]
    if len(set(sizes)) < len(sizes):
        options.append(Option("pieces stay equal", tied))
    options += [attribute(k) for k in range(max(map(len, choices.values()), default=0))]
    options.append(Option("pin", stay))
    chosen: Sequence[IntArray | None] = t.decide("pieces", options)
    return chosen


def select(t: Tracer, call: Call) -> None:
    """x[:, 3], unbind: one position of an axis."""
    x = call.inputs[0]
    value = t.value(x)
    dim = (call["dim"] or 0) % x.ndim
    t.pin(value.axes[dim], "single positions are picked by number")
    for out in call.outputs:
        t.set(out, [v for d, v in enumerate(value.axes) if d != dim], value.live, value.constant)


RULES = {
    "slice": slice_,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes",
                     "tensor_split"), split),
    **dict.fromkeys(("select", "unbind"), select),
}  # fmt: skip
