"""Movement: operators that only rearrange positions. The labels go through the same rearrangement."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.labels import Value
from attrim.trace.rules.sizes import place
from attrim.trace.tracer import Tracer

__all__ = ["RULES"]


def same(t: Tracer, call: Call) -> None:
    """clone, detach, to: every position stays where it is."""
    value = t.value(call.inputs[0])
    for out in call.outputs:
        t.set(out, value.axes, value.live, value.constant, value.free)


def permute(t: Tracer, call: Call) -> None:
    """permute, transpose, t, movedim: axes change places."""
    x = call.inputs[0]
    value = t.value(x)
    axes = list(value.axes)
    if call.name == "permute":
        axes = [axes[d] for d in call["dims"]]
    elif call.name == "t":
        axes = axes[::-1]
    else:
        a, b = call["dim0"] % x.ndim, call["dim1"] % x.ndim
        axes[a], axes[b] = axes[b], axes[a]
    t.set(call.out, axes, value.live, value.constant)


def unsqueeze(t: Tracer, call: Call) -> None:
    value = t.value(call.inputs[0])
    axes = list(value.axes)
    axes.insert(call["dim"] % call.out.ndim, None)
    t.set(call.out, axes, value.live, value.constant)


def squeeze(t: Tracer, call: Call) -> None:
    x = call.inputs[0]
    value = t.value(x)
    dims = call["dim"] if call.has("dim") else range(x.ndim)
    gone = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims) if x.shape[d] == 1} if x.ndim else set()
    for d in gone:
        t.pin(value.axes[d], "an axis of one channel is squeezed away")
    t.set(call.out, [v for d, v in enumerate(value.axes) if d not in gone], value.live, value.constant)


def reshape(t: Tracer, call: Call) -> None:
    """view, reshape, flatten, unflatten: axes are regrouped; each regrouped block of labels is reshaped as such."""
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    if not value.labelled:
        t.set(out, (None,) * out.ndim, value.live, value.constant)
        return
    if x.shape == out.shape:
        t.set(out, value.axes, value.live, value.constant)
        return
    blocks = _blocks(tuple(x.shape), tuple(out.shape))
    if blocks is None:
        t.pin_all([value], "reshaped through a size of 0")
        t.set(out, (None,) * out.ndim, value.live)
        return
    tables: list[tuple[IntArray, tuple[int, ...]]] = []
    for inside, outside in blocks:
        shape_in = [x.shape[d] for d in inside]
        shape_out = [out.shape[d] for d in outside]
        for i, d in enumerate(inside):
            vector = value.axes[d]
            if vector is None:
                continue
            spread = vector.reshape([-1 if k == i else 1 for k in range(len(inside))])
            tables.append((np.broadcast_to(spread, shape_in).reshape(shape_out), tuple(outside)))
    place(t, call, value, out, tables)


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Smallest runs of axes of equal product, in order: (2, 6, 4) -> (2, 2, 3, 4) gives [0]-[0], [1]-[1, 2], [2]-[3]."""
    if 0 in before or 0 in after:
        return None
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        inside, outside = [i], [j]
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= before[i]
                inside.append(i)
                i += 1
            else:
                right *= after[j]
                outside.append(j)
                j += 1
        blocks.append((inside, outside))
    if blocks:  # only axes of size 1 can be left over
        blocks[-1][0].extend(range(i, len(before)))
        blocks[-1][1].extend(range(j, len(after)))
    return blocks


def as_strided(t: Tracer, call: Call) -> None:
    """A change of strides on axes of size 1 moves nothing (pooling on channels-last maps); anything else is opaque."""
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    known = out.shape == x.shape and all(n == 1 or v is None for n, v in zip(x.shape[2:], value.axes[2:], strict=True))
    if known and x.ndim >= 2 and all(n == 1 for n in x.shape[2:]):
        t.set(out, value.axes, value.live, value.constant, value.free)
        return
    t.pin_all([value], "strides are set by hand")
    t.set(out, (None,) * out.ndim, True)


def concat(t: Tracer, call: Call) -> None:
    """cat and stack: along the joined axis labels are concatenated, on the others they are tied."""
    parts = [x for x in call.inputs if not (x.ndim == 1 and x.shape[0] == 0 and call.out.ndim > 1)]
    values = [t.value(x) for x in parts]
    out: Tensor = call.out
    dim = (call["dim"] or 0) % out.ndim
    live = any(v.live for v in values)
    if call.name == "stack":
        values = [Value((*v.axes[:dim], None, *v.axes[dim:]), v.live, v.constant) for v in values]
        sizes = [1] * len(values)
    else:
        sizes = [x.shape[dim] for x in parts]
    axes: list[IntArray | None] = []
    for d in range(out.ndim):
        vectors = [v.axes[d] for v in values]
        if d == dim:
            pieces = [np.zeros(n, np.int64) if v is None else v for v, n in zip(vectors, sizes, strict=True)]
            axes.append(np.concatenate(pieces) if any(v is not None for v in vectors) else None)
        else:
            axes.append(tie_all(t, vectors, [v.indifferent(d) or out.shape[d] == 1 for v in values]))
    t.set(out, axes, live)


def tie_all(t: Tracer, vectors: Sequence[IntArray | None], indifferent: Sequence[bool]) -> IntArray | None:
    """Tie all vectors with each other; one without labels pins them unless it is indifferent to its size."""
    first: IntArray | None = None
    fixed = False
    for vector, free in zip(vectors, indifferent, strict=True):
        if vector is None:
            fixed = fixed or not free
        elif first is None:
            first = vector
        else:
            t.tie(first, vector)
    if first is not None and fixed:
        t.pin(first, "combined with a tensor whose size does not follow the cut")
    return first


def constant_pad(t: Tracer, call: Call) -> None:
    """Padding brings positions that can never go."""
    x = call.inputs[0]
    value = t.value(x)
    pad = call["pad"]
    axes = list(value.axes)
    for k in range(len(pad) // 2):
        d = x.ndim - 1 - k
        vector = axes[d]
        low, high = pad[2 * k], pad[2 * k + 1]
        if vector is not None and (low or high):
            vector = vector[max(0, -low) : len(vector) - max(0, -high)]
            axes[d] = np.pad(vector, (max(0, low), max(0, high)))
    t.set(call.out, axes, value.live)


def expand(t: Tracer, call: Call) -> None:
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    shift = out.ndim - x.ndim
    tables: list[tuple[IntArray, tuple[int, ...]]] = []
    for d, vector in enumerate(value.axes):
        if vector is not None and x.shape[d] == out.shape[d + shift]:
            tables.append((vector, (d + shift,)))
        else:
            t.pin(vector, "an axis of one channel is expanded")
    place(t, call, value, out, tables)
    grown = {d for d in range(out.ndim) if d < shift or x.shape[d - shift] != out.shape[d]}
    t.value(out).free = frozenset(grown | {d + shift for d in value.free})


def repeat(t: Tracer, call: Call) -> None:
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    shift = out.ndim - x.ndim
    axes: list[IntArray | None] = [None] * shift
    for d, vector in enumerate(value.axes):
        axes.append(None if vector is None else np.tile(vector, out.shape[d + shift] // x.shape[d]))
    t.set(out, axes, value.live, value.constant)


def run_on_labels(t: Tracer, call: Call) -> None:
    """The operator itself, run on the labels of one axis at a time; what varies along two axes is tied to one."""
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    tables: list[tuple[IntArray, tuple[int, ...]]] = []
    for d, vector in enumerate(value.axes):
        if vector is not None:
            shape = [-1 if k == d else 1 for k in range(x.ndim)]
            moved = _outside(call, vector.reshape(shape), tuple(x.shape))
            tables.append((moved, tuple(range(out.ndim))))
    place(t, call, value, out, tables)


def roll(t: Tracer, call: Call) -> None:
    """A roll by a constant puts other channels next to each other once some are gone, so rolled axes stay."""
    value = t.value(call.inputs[0])
    for d in call["dims"] or range(len(value.axes)):
        t.pin(value.axes[d], "rolled by a constant along the channel axis")
    run_on_labels(t, call)


def _outside(call: Call, labels: IntArray, shape: tuple[int, ...]) -> IntArray:
    """Run the operator on labels spread to ``shape``, in a thread of its own: dispatch modes belong to a thread."""

    def run() -> IntArray:
        spread = torch.tensor(labels, dtype=torch.float64).expand(shape)
        moved: Tensor = call.func(spread, *call.args[1:], **call.kwargs)
        return moved.numpy().astype(np.int64)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


def index(t: Tracer, call: Call) -> None:
    """Indexing by tensors: the indexed axes must stay (their positions are numbers in a tensor), others flow on."""
    x, out = call.inputs[0], call.outputs[0]
    value = t.value(x)
    indices: list[Any] = list(call["indices"]) + [None] * (x.ndim - len(call["indices"]))
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        t.pin(value.axes[d], "indexed by position numbers held in a tensor")
        t.pin_all([t.value(indices[d])], "holds position numbers")
    adjacent = bool(used) and used == list(range(used[0], used[-1] + 1))
    mask = any(indices[d].dtype in (torch.bool, torch.uint8) for d in used)
    if not adjacent or mask:
        t.pin_all([value], "indexed by a mask or on separate axes")
        t.set(out, (None,) * out.ndim, True)
        return
    new = out.ndim - (x.ndim - len(used))
    axes = [*value.axes[: used[0]], *([None] * new), *value.axes[used[-1] + 1 :]]
    t.set(out, axes, value.live)


def along(t: Tracer, call: Call) -> None:
    """gather, sort, cumsum, topk, index_select, flip: the named axis must stay, the others flow on."""
    x = call.inputs[0]
    value = t.value(x)
    dim = call["dim"] if call.has("dim") else None
    dims = range(x.ndim) if dim is None else [dim % max(1, x.ndim)]
    for d in dims:
        t.pin(value.axes[d], f"{call.name} along the channel axis depends on position")
    t.pin_all([t.value(other) for other in call.inputs[1:]], "holds position numbers")
    for out in call.outputs:
        if out.ndim == x.ndim:
            t.set(out, [None if d in dims else v for d, v in enumerate(value.axes)], True)
        else:
            t.pin_all([value], f"{call.name} changes the number of axes")
            t.set(out, (None,) * out.ndim, True)


RULES = {
    **dict.fromkeys(
        ("clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh", "lift_fresh_copy", "native_dropout",
         "dropout", "feature_dropout", "alpha_dropout", "_conj", "resolve_conj", "resolve_neg", "positive", "requires_grad",
         "_reshape_alias_same", "detach_copy", "bernoulli", "pin_memory", "fill", "zero", "normal", "uniform", "exponential",
         "_pin_memory", "view_as_real_same", "_autocast_to_reduced_precision", "_autocast_to_full_precision"), same),
    **dict.fromkeys(("permute", "transpose", "t", "swapaxes", "swapdims"), permute),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "_reshape_copy"), reshape),
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "cat": concat,
    "concat": concat,
    "stack": concat,
    "constant_pad_nd": constant_pad,
    "expand": expand,
    "repeat": repeat,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "flip", "im2col",
                     "unfold", "rot90"), run_on_labels),
    "as_strided": as_strided,
    "roll": roll,
    "index": index,
    "_unsafe_index": index,
    **dict.fromkeys(("gather", "sort", "topk", "cumsum", "cumprod", "index_select", "logcumsumexp", "argsort",
                     "kthvalue", "median", "mode", "diff"), along),
}  # fmt: skip
