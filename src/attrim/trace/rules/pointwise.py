"""Pointwise operators: what meets at one position goes together. Also constant-filled tensors and copies."""

from __future__ import annotations

from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.labels import Cell
from attrim.trace.rules.move import tie_all
from attrim.trace.tracer import Tracer

__all__ = ["RULES", "pointwise", "silent"]


def pointwise(t: Tracer, call: Call) -> None:
    """Tie along equal axes; an axis of size 1 is broadcast; a partner without labels pins."""
    inputs = call.inputs
    values = [t.value(x) for x in inputs]
    live = any(v.live for v in values)
    labelled = any(v.labelled for v in values)
    for out in call.outputs:
        axes: list[IntArray | None] = [None] * out.ndim
        if labelled:
            for d in range(out.ndim):
                vectors, free = [], []
                for x, v in zip(inputs, values, strict=True):
                    k = d - out.ndim + x.ndim
                    if k >= 0 and x.shape[k] == out.shape[d]:
                        vectors.append(v.axes[k])
                        free.append(v.indifferent(k) or x.shape[k] == 1)
                axes[d] = tie_all(t, vectors, free)
        alone = values[0] if len(values) == 1 else None
        t.set(out, axes, live, alone.constant if alone else None, alone.free if alone else frozenset())


def copy(t: Tracer, call: Call) -> None:
    """copy_: the destination takes the source's labels; into a fresh constant buffer they must stay."""
    target, source = call["self"], call["src"]
    written = t.value(target)
    if written.constant is not None:
        written.constant.live = written.constant.live or t.value(source).live
    if written.constant is not None and written.constant.on and not written.labelled:
        t.pin_all([t.value(source)], "copied into a freshly made buffer")
        written.constant.on = False
        t.set(target, (None,) * target.ndim, t.value(source).live, written.constant)
        return
    pointwise(t, call)


def constant(t: Tracer, call: Call) -> None:
    """zeros, ones, full, empty: the same value everywhere, so the size is free to follow its partner."""
    for out in call.outputs:
        t.set(out, (None,) * out.ndim, False, Cell())


def like(t: Tracer, call: Call) -> None:
    """zeros_like, rand_like: labels of the template; the content is new."""
    value = t.value(call.inputs[0])
    for out in call.outputs:
        t.set(out, value.axes, False, None if "rand" in call.name else Cell())


def silent(t: Tracer, call: Call) -> None:
    """arange, scalar tensors and the like: no labels, nothing flows in."""
    for out in call.outputs:
        t.set(out, (None,) * out.ndim, False)


RULES = {
    "copy": copy,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor",
                     "empty_strided", "new_empty_strided", "empty_permuted"), constant),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"), like),
    **dict.fromkeys(("arange", "linspace", "eye", "randn", "rand", "randint", "randperm", "tril_indices", "triu_indices",
                     "_local_scalar_dense", "sym_size", "is_same_size", "equal", "hann_window", "_assert_async",
                     "_assert_scalar", "_assert_tensor_metadata"), silent),
    **dict.fromkeys(("masked_fill", "where", "lerp", "addcmul", "addcdiv", "_prelu_kernel", "prelu", "hardswish", "hardsigmoid",
                     "hardtanh", "relu6", "rrelu_with_noise", "rsub", "celu", "selu", "silu", "mish", "gelu", "clamp",
                     "nan_to_num", "triu", "tril", "heaviside", "softplus", "softshrink", "hardshrink", "threshold",
                     "log_sigmoid_forward", "log_sigmoid", "frac", "to_dense", "leaky_relu", "elu", "logit", "square",
                     "isfinite", "isnan", "isinf", "fmod", "remainder"), pointwise),
}  # fmt: skip
