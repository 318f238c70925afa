"""Reductions and operators on space: channels pass along; reducing over channels is noted or refused."""

from __future__ import annotations

from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.tracer import Tracer

__all__ = ["REDUCED", "RULES"]

_EXACT = ("sum", "linalg_vector_norm", "norm", "count_nonzero", "any", "nansum")
"""Reductions in which a position of zeros counts for nothing."""

_INEXACT = ("mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "logsumexp", "prod", "aminmax")


def reduce(t: Tracer, call: Call) -> None:
    """sum, mean, max, norm … over some axes."""
    x = call.inputs[0]
    value = t.value(x)
    dims = reduced_dims(call, x.ndim)
    for d in dims:
        vector = value.axes[d]
        if vector is None or call.name in _EXACT:
            continue
        if call.name in _INEXACT:
            t.effect(vector, f"{call.name} over channels")
        else:
            t.pin(vector, f"{call.name} over the channel axis depends on position")
        if not value.live:
            t.effect(vector, "a weight is computed from the removed part")
    if not value.live and call.name in _EXACT:
        for d in dims:
            t.effect(value.axes[d], "a weight is computed from the removed part")
    keep = bool(call["keepdim"]) if call.has("keepdim") else False
    axes: list[IntArray | None] = []
    for d, vector in enumerate(value.axes):
        if d not in dims:
            axes.append(vector)
        elif keep:
            axes.append(None)
    for out in call.outputs:
        t.set(out, axes if len(axes) == out.ndim else (None,) * out.ndim, value.live)


def reduced_dims(call: Call, ndim: int) -> list[int]:
    """The axes that a reduction runs over; all of them by default."""
    dim = call["dim"] if call.has("dim") else None
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(ndim))
    return [d % ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])] if ndim else []


def _spatial(count: int):  # type: ignore[no-untyped-def]
    def rule(t: Tracer, call: Call) -> None:
        x = call.inputs[0]
        value = t.value(x)
        for vector in value.axes[x.ndim - count :]:
            t.pin(vector, f"{call.name} runs along the channel axis")
        for out in call.outputs:
            t.set(out, (*value.axes[: x.ndim - count], *[None] * (out.ndim - x.ndim + count)), True)

    return rule


def embedding(t: Tracer, call: Call) -> None:
    """Lookup: rows are addressed by number and stay, columns are channels."""
    weight = t.value(call["weight"])
    t.pin(weight.axes[0], "rows are looked up by number")
    t.role(weight.axes[1], "out")
    t.set(call.out, (*[None] * (call.out.ndim - 1), weight.axes[1]), True)


def glu(t: Tracer, call: Call) -> None:
    """a · sigmoid(b) for the two halves of an axis."""
    x = call.inputs[0]
    value = t.value(x)
    dim = call["dim"] % x.ndim
    axes = list(value.axes)
    vector = axes[dim]
    if vector is not None:
        axes[dim] = t.merge(vector.reshape(2, -1), 1)
    t.set(call.out, axes, value.live)


_POOLS = ("avg_pool{}d", "max_pool{}d_with_indices", "max_pool{}d", "_adaptive_avg_pool{}d", "adaptive_avg_pool{}d",
          "adaptive_max_pool{}d", "reflection_pad{}d", "replication_pad{}d", "upsample_nearest{}d",
          "_upsample_nearest_exact{}d", "upsample_linear{}d", "upsample_bilinear{}d", "upsample_bicubic{}d",
          "upsample_trilinear{}d", "_upsample_bilinear{}d_aa", "_upsample_bicubic{}d_aa", "grid_sampler_{}d",
          "fractional_max_pool{}d", "mkldnn_max_pool{}d", "lp_pool{}d")  # fmt: skip

RULES = {
    **dict.fromkeys((*_EXACT, *_INEXACT, "argmax", "argmin", "all"), reduce),
    **{name.format(n): _spatial(n) for name in _POOLS for n in (1, 2, 3)},
    "embedding": embedding,
    "glu": glu,
}

REDUCED = _EXACT
"""Reductions whose removed positions must read as zero when the original is masked."""
