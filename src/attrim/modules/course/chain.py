"""The operators between a contraction and the place where its output is compared: movements and affine maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Norm", "Step", "affine_of", "is_addition", "is_rectifier", "step_of", "undo_movements"]

_BY_SHAPE = frozenset({"view", "_unsafe_view", "unsqueeze", "squeeze", "_reshape_alias", "reshape"})
_SAME = frozenset({"clone", "detach", "alias", "contiguous"})
_NORMS = frozenset(
    {
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "_batch_norm_impl_index",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    }
)
_RECTIFIERS = frozenset({"relu", "relu_", "clamp_min", "clamp_min_", "hardtanh", "hardtanh_"})


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """The tensors of a batch norm in eval mode, the very ones that the module holds."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operator on the way, as it was called. Holds parameters and numbers, but not the tensor that is followed.

    Attributes:
        kind: ``move``, ``same``, ``norm``, ``scale`` or ``shift``.
        func, args, kwargs: the call; None stands for the tensor that is followed.
        slot: its place in ``args``.
        shape: its shape.
        other: the factor or summand of ``scale`` and ``shift``.
        in_place: whether it was changed itself.
    """

    kind: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int
    shape: torch.Size
    other: Tensor | float | None
    in_place: bool

    def run(self, value: Tensor) -> Tensor:
        """The same operator on another value."""
        result = self.func(*self.args[: self.slot], value, *self.args[self.slot + 1 :], **self.kwargs)
        return result if isinstance(result, Tensor) else result[0]

    @property
    def norm(self) -> Norm:
        """The batch norm of a step of the kind ``norm``."""
        _, weight, bias, mean, var, *rest = self.args
        numbers = [v for v in (*rest, *self.kwargs.values()) if isinstance(v, float)]
        return Norm(weight, bias, mean, var, float(numbers[-1]))


def step_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Tensor, constants: set[int]
) -> Step | None:
    """The call as a step if it moves ``source`` or maps each of its channels affinely.

    Args:
        func, args, kwargs: the call of an ATen operator.
        source: the tensor that is followed.
        constants: addresses of the storages of parameters and buffers.
    """
    name = func.overloadpacket.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    plain = name.rstrip("_") if in_place else name
    kind, other = "", None
    if args and args[0] is source and (plain in _BY_SHAPE or plain in ("permute", "transpose", "t")):
        kind = "move"
    elif args and args[0] is source and plain in _SAME:
        kind = "same"
    elif name in _NORMS and args[0] is source and not _trains(name, args):
        kind = "norm"
    elif plain in ("mul", "add") and len(args) == 2 and not kwargs:
        other = args[1] if args[0] is source else args[0]
        constant = isinstance(other, int | float) or (
            isinstance(other, Tensor) and other.untyped_storage().data_ptr() in constants
        )
        if constant and not (in_place and args[0] is not source):
            kind = "scale" if plain == "mul" else "shift"
    if not kind:
        return None
    slot = next(i for i, a in enumerate(args) if a is source)
    if any(isinstance(a, Tensor) and a is not other and _is_activation(a, constants) for a in args if a is not source):
        return None
    kept = (*args[:slot], None, *args[slot + 1 :])
    return Step(kind, func, kept, kwargs, slot, source.shape, other, in_place)


def _is_activation(tensor: Tensor, constants: set[int]) -> bool:
    return tensor.untyped_storage().data_ptr() not in constants


def _trains(name: str, args: Sequence[Any]) -> bool:
    """Whether a batch norm uses the statistics of the batch, which are no fixed affine map."""
    if len(args) < 5 or args[3] is None or args[4] is None:
        return True
    return name in ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm") and bool(
        args[5]
    )


def is_addition(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call is a plain sum of two tensors of one shape."""
    if func.overloadpacket.__name__ not in ("add", "add_") or len(args) != 2 or kwargs.get("alpha", 1) != 1:
        return False
    a, b = args
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def is_rectifier(func: Any, args: Sequence[Any]) -> bool:
    """Whether the call sets everything below zero to zero."""
    name = func.overloadpacket.__name__
    if name not in _RECTIFIERS:
        return False
    return name in ("relu", "relu_") or (len(args) > 1 and args[1] == 0)


def undo_movements(value: Tensor, steps: Sequence[Step]) -> Tensor:
    """A tensor in the layout after ``steps`` brought back into the layout before them; values stay as they are."""
    for step in reversed(steps):
        if step.kind != "move":
            continue
        name = step.func.overloadpacket.__name__
        if name == "permute":
            value = value.permute(_inverse(step.args[1]))
        elif name == "transpose":
            value = value.transpose(step.args[1], step.args[2])
        elif name == "t":
            value = value.t()
        else:
            value = value.reshape(step.shape)
    return value


def _inverse(order: Sequence[int]) -> list[int]:
    rank = len(order)
    back = [0] * rank
    for place, dim in enumerate(order):
        back[dim % rank] = place
    return back


def affine_of(
    steps: Sequence[Step], outputs: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift per channel of all steps together, each of shape ``(outputs,)``; None if a size does not fit."""
    scale = torch.ones(outputs, dtype=dtype, device=device)
    shift = torch.zeros(outputs, dtype=dtype, device=device)
    for step in steps:
        if step.kind == "norm":
            norm = step.norm
            gain = (norm.var.detach().to(dtype) + norm.eps).rsqrt()
            if norm.weight is not None:
                gain = gain * norm.weight.detach().to(dtype)
            offset = -norm.mean.detach().to(dtype) * gain
            if norm.bias is not None:
                offset = offset + norm.bias.detach().to(dtype)
        elif step.kind in ("scale", "shift"):
            value = torch.as_tensor(step.other, dtype=dtype, device=device).detach().flatten()
            one, none = torch.ones_like(value), torch.zeros_like(value)
            gain, offset = (value, none) if step.kind == "scale" else (one, value)
        else:
            continue
        if gain.numel() not in (1, outputs):
            return None
        scale, shift = scale * gain, shift * gain + offset
    return scale, shift
