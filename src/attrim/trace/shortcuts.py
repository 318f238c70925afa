"""Results of the commonest operators on fake tensors, without dispatching them.

Fake execution derives every result's shape through Python decompositions, some of which cost milliseconds the first time.
Where the result has plainly the shape of its input, it is made directly. Anything else is left to the operator itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attrim.trace.call import Call

__all__ = ["fake_like", "shortcut"]

_CPU = torch.device("cpu")

_UNARY = frozenset(
    ("relu", "silu", "gelu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish", "relu6")
)  # fmt: skip

_BINARY = frozenset(("add", "mul", "sub"))


def fake_like(
    mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
) -> Tensor:
    """A fake CPU tensor, made directly; a dispatched factory costs ten times as much."""
    with torch._C._DisableTorchDispatch():  # otherwise the mode that is active would dispatch the meta tensor as well
        if stride is None:
            meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        else:
            meta = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")
        return FakeTensor(mode, meta, _CPU)


def shortcut(mode: FakeTensorMode, call: Call, in_place: bool) -> Any:
    """The result of ``call`` on fake tensors, or None to run the operator."""
    if call.name == "native_batch_norm":
        return _batch_norm(mode, call)
    if call.name == "empty" and call.func is torch.ops.aten.empty.memory_format:
        if call.kwargs.get("device") in (None, _CPU) and call.kwargs.get("memory_format") is None:
            dtype = call.kwargs.get("dtype") or torch.get_default_dtype()
            return fake_like(mode, call.args[0], dtype)
        return None
    if call.name == "cat":
        return _cat(mode, call)
    if call.name in _UNARY and len(call.inputs) == 1:
        return _same(mode, call.inputs[0], in_place)
    if call.name in _BINARY and len(call.args) == 2:
        a, b = call.args
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
            return _same(mode, a, in_place) if in_place or a.stride() == b.stride() else None
    return None


def _same(mode: FakeTensorMode, x: Tensor, in_place: bool) -> Tensor | None:
    """A result of the input's shape; strides are only certain where the input fills its memory."""
    if in_place:
        return x
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    if not x.is_floating_point() or not dense:
        return None
    return fake_like(mode, x.shape, x.dtype, x.stride())


def _cat(mode: FakeTensorMode, call: Call) -> Tensor | None:
    """Contiguous parts of one dtype that agree on the other axes; a dense block joins every earlier layer again."""
    parts = call.inputs
    first, dim = parts[0], call["dim"] % max(1, parts[0].ndim)
    shape = list(first.shape)
    for part in parts[1:]:
        if part.ndim != first.ndim or part.dtype != first.dtype:
            return None
        if any(a != b for d, (a, b) in enumerate(zip(part.shape, first.shape, strict=True)) if d != dim):
            return None
        shape[dim] += part.shape[dim]
    if not all(part.is_contiguous() for part in parts):
        return None
    return fake_like(mode, shape, first.dtype)


def _batch_norm(mode: FakeTensorMode, call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
    x, training = call["input"], call["training"]
    known = [call[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if training or any(v is None or v.shape != (x.shape[1],) for v in known):
        return None
    out = _same(mode, x, False)
    if out is None:
        return None
    return out, fake_like(mode, (0,), x.dtype), fake_like(mode, (0,), x.dtype)
