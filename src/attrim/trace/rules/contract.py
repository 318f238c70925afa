"""Contraction: convolutions, linear layers, matrix products, attention. Contracted axes are tied, free axes flow on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.labels import Cell, Value
from attrim.trace.tracer import Option, Tracer

__all__ = ["CONTRACTED", "RULES"]


def _contract(t: Tracer, va: Value, da: int, vb: Value, db: int) -> IntArray | None:
    """Tie axis ``da`` of one operand with axis ``db`` of the other; returns the labels of the contracted axis."""
    a, b = va.axes[da], vb.axes[db]
    if a is not None and b is not None and not (va.live or vb.live):
        t.effect(a, "a weight is computed from the removed part")
    if (a is None and va.uniform) or (b is None and vb.uniform):
        return b if a is None else a
    t.tie(a, b, "contracted with an axis that does not follow the cut")
    return b if a is None else a


def _roles(t: Tracer, value: Value, out: int, inside: int) -> None:
    if not value.live:
        t.role(value.axes[out], "out")
        t.role(value.axes[inside], "in")


def _cost(t: Tracer, sizes: Sequence[int], vectors: Sequence[IntArray | None]) -> None:
    """One counted product: unlabelled sizes go into the coefficient."""
    fixed = math.prod(n for n, v in zip(sizes, vectors, strict=True) if v is None)
    t.book.cost(fixed, tuple(v for v in vectors if v is not None), t.op)


def convolution(t: Tracer, call: Call) -> None:
    """Plain, dilated, transposed, grouped and depthwise convolution of any dimension."""
    x, weight, bias, out = call["input"], call["weight"], call["bias"], call.out
    groups, transposed = call["groups"], call["transposed"]
    xv, wv = t.value(x), t.value(weight)
    space = _untouched(t, call, xv)
    for vector in wv.axes[2:]:
        t.pin(vector, "kernel size")
    if groups == 1 and "whole groups" not in t.recorded_options():  # one surviving group is still a group
        inside, outside = (0, 1) if transposed else (1, 0)
        _contract(t, xv, 1, wv, inside)
        _roles(t, wv, outside, inside)
        channels = wv.axes[outside]
    else:
        channels = _grouped(t, x, weight, xv, wv, groups, transposed)
    counted = x if transposed else out
    kernel = tuple(weight.shape[2:])
    _cost(
        t,
        (*counted.shape[2:], *kernel, counted.shape[0], weight.shape[0], weight.shape[1]),
        (*space, *[None] * len(kernel), xv.axes[0], wv.axes[0], wv.axes[1]),
    )
    if bias is not None:
        bv = t.value(bias)
        t.tie(bv.axes[0], channels)
        if not bv.live:
            t.role(bv.axes[0], "shift")
    t.set(out, (xv.axes[0], channels, *space), xv.live or wv.live)


def _untouched(t: Tracer, call: Call, xv: Value) -> list[IntArray | None]:
    """Labels on the spatial axes: a kernel of size 1 leaves them where they are, any other mixes neighbours."""
    space: list[IntArray | None] = []
    for k, vector in enumerate(xv.axes[2:]):
        plain = call["weight"].shape[2 + k] == 1 and _at(call["stride"], k) == 1 and _at(call["padding"], k) == 0
        if not plain:
            t.pin(vector, "a convolution slides along the channel axis")
        space.append(vector if plain else None)
    return space


def _at(values: Sequence[int], k: int) -> int:
    return values[k] if len(values) > 1 else values[0]


def _grouped(
    t: Tracer, x: Tensor, weight: Tensor, xv: Value, wv: Value, groups: int, transposed: bool
) -> IntArray | None:
    """Block structure: either whole groups go, or the same place goes in every group."""
    ins = x.shape[1] // groups
    outs = weight.shape[1] if transposed else weight.shape[0] // groups
    rows, columns = wv.axes[0], wv.axes[1]
    blank = np.zeros(1, np.int64)
    x_table = None if xv.axes[1] is None else xv.axes[1].reshape(groups, ins)
    if rows is not None and not wv.live:
        t.role(rows, "in" if transposed and ins > 1 else "out")
        t.role(columns, "out" if transposed else "in")

    def whole() -> IntArray | None:
        t.pin(columns, "a place within each group of a grouped convolution")
        parts = [x_table] if x_table is not None else []
        if x_table is None:
            t.pin(rows, "contracted with an axis that does not follow the cut")
        if rows is not None:
            parts.append(rows.reshape(groups, -1))
        elif x_table is not None and not wv.indifferent(0):
            t.pin(x_table.ravel(), "meets a grouped weight whose size does not follow the cut")
        if not parts:
            return None
        unit = t.merge(np.concatenate(parts, axis=1), 0)
        return np.repeat(unit, outs) if transposed or rows is None else rows

    def places() -> IntArray | None:
        inner = rows.reshape(groups, ins) if transposed and rows is not None else None
        if transposed:
            t.tie(
                None if x_table is None else x_table.ravel(),
                rows,
                "contracted with an axis that does not follow the cut",
            )
            if inner is not None:
                t.merge(inner, 1)
            return None if columns is None else np.tile(columns, groups)
        if x_table is None:
            t.pin(columns, "contracted with an axis that does not follow the cut")
        else:
            t.tie(t.merge(x_table, 1), columns if columns is not None else blank.repeat(ins))
        if rows is not None:
            t.merge(rows.reshape(groups, outs), 1)
        return rows

    def stay() -> None:
        for labels in (xv.axes[1], rows, columns):
            t.pin(labels, f"a grouped convolution with a constant number of groups ({groups})")

    first_whole = ins == 1 or (transposed and outs == 1) or groups > max(ins, outs)
    options = [Option("whole groups", whole), Option("the same place in every group", places)]
    options = options if first_whole else options[::-1]
    chosen: IntArray | None = t.decide("groups", [*options, Option("pin", stay)], (groups, ins, outs))
    return chosen


def linear(t: Tracer, call: Call) -> None:
    """aten.linear, where it is not decomposed."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    xv, wv = t.value(x), t.value(weight)
    _contract(t, xv, -1, wv, 1)
    _roles(t, wv, 0, 1)
    _cost(t, (*x.shape, weight.shape[0]), (*xv.axes[:-1], wv.axes[1], wv.axes[0]))
    if bias is not None:
        _bias(t, bias, (*xv.axes[:-1], wv.axes[0]), call.out)
    t.set(call.out, (*xv.axes[:-1], wv.axes[0]), xv.live or wv.live)


def _bias(t: Tracer, bias: Tensor, axes: Sequence[IntArray | None], out: Tensor) -> None:
    value = t.value(bias)
    for d, vector in enumerate(axes):
        k = d - out.ndim + bias.ndim
        if k >= 0 and bias.shape[k] == out.shape[d]:
            if not (bias.shape[k] == 1 or value.uniform):
                t.tie(value.axes[k], vector)
            if not value.live:
                t.role(value.axes[k], "shift")


def matmul(t: Tracer, call: Call) -> None:
    """mm, addmm, bmm, baddbmm: (…, n, k) times (…, k, m)."""
    added = call.name in ("addmm", "baddbmm", "_addmm_activation")
    a, b = call.inputs[1:3] if added else call.inputs[:2]
    va, vb = t.value(a), t.value(b)
    live = va.live or vb.live
    inner = _contract(t, va, -1, vb, -2)
    _roles(t, va, -2, -1)
    _roles(t, vb, -1, -2)
    batch: list[IntArray | None] = []
    if a.ndim == 3:
        t.tie(va.axes[0], vb.axes[0], "multiplied in one batch with an axis that does not follow the cut")
        batch = [va.axes[0] if va.axes[0] is not None else vb.axes[0]]
    axes = [*batch, va.axes[-2], vb.axes[-1]]
    own = va.axes[-1] if not va.live else vb.axes[-2] if not vb.live else None
    inner = inner if own is None else own  # a weight's own axis, as convolutions have it
    _cost(t, (*a.shape, b.shape[-1]), (*batch, va.axes[-2], inner, vb.axes[-1]))
    if added:
        _bias(t, call.inputs[0], axes, call.out)
    t.set(call.out, axes, live)


def vector_product(t: Tracer, call: Call) -> None:
    """mv, addmv, dot: contraction down to fewer axes (not counted as MACs by torch, nor here)."""
    a, b = call.inputs[-2:]
    va, vb = t.value(a), t.value(b)
    _contract(t, va, -1, vb, 0)
    if a.ndim == 2:
        _roles(t, va, 0, 1)
    if call.name == "addmv":
        _bias(t, call.inputs[0], va.axes[:-1], call.out)
    t.set(call.out, va.axes[:-1], va.live or vb.live)


def attention(t: Tracer, call: Call) -> None:
    """Scaled dot-product attention on (…, heads, tokens, width)."""
    q, k, v = (call[name] for name in ("query", "key", "value"))
    vq, vk, vv = t.value(q), t.value(k), t.value(v)
    if vq.axes[-1] is not None or vk.axes[-1] is not None:
        t.tie(vq.axes[-1], vk.axes[-1], "contracted with an axis that does not follow the cut")
        t.effect(vq.axes[-1], "attention scale")
    t.tie(vk.axes[-2], vv.axes[-2], "contracted with an axis that does not follow the cut")
    batch = []
    for d in range(q.ndim - 2):
        _heads(t, vq.axes[d], vk.axes[d], q.shape[d], k.shape[d])
        _heads(t, vq.axes[d], vv.axes[d], q.shape[d], v.shape[d])
        batch.append(vq.axes[d])
    mask = call["attn_mask"] if call.has("attn_mask") else call["attn_bias"] if call.has("attn_bias") else None
    if mask is not None:
        _bias(t, mask, [*batch, vq.axes[-2], vk.axes[-2]], _Shape((*q.shape[:-1], k.shape[-2])))  # type: ignore[arg-type]
    _cost(t, (*q.shape, k.shape[-2]), (*vq.axes, vk.axes[-2]))
    _cost(t, (*q.shape[:-1], k.shape[-2], v.shape[-1]), (*vq.axes[:-1], vk.axes[-2], vv.axes[-1]))
    outs = call.outputs
    t.set(outs[0], (*batch, vq.axes[-2], vv.axes[-1]), True)
    for out in outs[1:]:
        t.set(out, (*batch, vq.axes[-2])[: out.ndim] if out.ndim == q.ndim - 1 else (None,) * out.ndim, True, Cell())


class _Shape:
    """Just enough of a tensor for :func:`_bias`: a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim = shape, len(shape)


def _heads(t: Tracer, a: IntArray | None, b: IntArray | None, na: int, nb: int) -> None:
    """Tie the heads of queries with those of keys or values; one key head may serve several query heads."""
    if na == nb or a is None or b is None:
        t.tie(a, b, "attends to heads that do not follow the cut")
    elif na % nb == 0:
        t.tie(a, np.repeat(b, na // nb))
        t.merge(a.reshape(nb, -1), 0)
    else:
        t.pin(a, "attention heads are broadcast")
        t.pin(b, "attention heads are broadcast")


def trilinear(t: Tracer, call: Call) -> None:
    """nn.Bilinear: Σ_ij x1_i W_oij x2_j."""
    a, weight, b = (t.value(call[name]) for name in ("i1", "i2", "i3"))
    if weight.live or len(weight.axes) != 3 or call["sumdim"] != [2, 3]:
        t.pin_all([a, weight, b], "a trilinear product of an unusual form")
        t.set(call.out, (None,) * call.out.ndim, True)
        return
    _contract(t, a, -1, weight, 1)
    _contract(t, b, -1, weight, 2)
    t.role(weight.axes[0], "out")
    t.role(weight.axes[1], "in")
    t.role(weight.axes[2], "in")
    t.set(call.out, (*[None] * (call.out.ndim - 1), weight.axes[0]), True)


RULES = {
    "_trilinear": trilinear,
    "convolution": convolution,
    "_convolution": convolution,
    "linear": linear,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "_addmm_activation"), matmul),
    **dict.fromkeys(("mv", "addmv", "dot", "vdot"), vector_product),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_fused_sdp_choice_sdpa",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
         "_scaled_dot_product_attention_math_for_mps", "scaled_dot_product_attention"), attention),
}  # fmt: skip

CONTRACTED: dict[str, tuple[tuple[str, int], ...]] = {
    "convolution": (("input", 1),),
    "_convolution": (("input", 1),),
    "linear": (("input", -1),),
    "_trilinear": (("i1", -1), ("i3", -1)),
    "mm": (("self", 1), ("mat2", 0)),
    "bmm": (("self", 2), ("mat2", 1)),
    "addmm": (("mat1", 1), ("mat2", 0)),
    "_addmm_activation": (("mat1", 1), ("mat2", 0)),
    "baddbmm": (("batch1", 2), ("batch2", 1)),
    "mv": (("self", 1), ("vec", 0)),
    "addmv": (("mat", 1), ("vec", 0)),
    "dot": (("self", 0), ("tensor", 0)),
    "vdot": (("self", 0), ("other", 0)),
    **{
        name: (("query", -1), ("key", -1), ("key", -2), ("value", -2)) for name in RULES if "scaled_dot_product" in name
    },
}
"""Operator -> (argument, axis) pairs that are summed over: where a removed position must read as zero."""
