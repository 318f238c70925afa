"""Batch norms written into the convolutions before them, for the time of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attrim.methods.fast.recording import Recording

__all__ = ["fold", "foldable", "folded"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable(model: nn.Module, recording: Recording) -> list[tuple[str, str]]:
    """Paths of convolutions and of the batch norms that alone read their outputs; each is called once in a pass."""
    modules = dict(model.named_modules())
    counts: dict[str, int] = {}
    uses: dict[int, int] = {}
    for call in recording.calls:
        counts[call.key[0]] = counts.get(call.key[0], 0) + 1
    for module in modules.values():
        for tensor in module._parameters.values():
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    gives = {
        call.outputs[0]: call
        for call in recording.calls
        if len(call.outputs) == 1 and _is(modules, call, _CONVOLUTIONS)
    }
    readers: dict[int, int] = {}
    for op in recording.ops:
        for storage in op.reads:
            readers[storage] = readers.get(storage, 0) + 1
    pairs = []
    for call in recording.calls:
        source = gives.get(call.takes[0]) if len(call.takes) == 1 and _is(modules, call, _NORMS) else None
        if source is None:
            continue
        norm, conv = modules[call.key[0]], modules[source.key[0]]
        inside = sum(bool(source.gives & op.reads) for op in recording.ops[call.begin : call.end])
        alone = sum(readers.get(storage, 0) for storage in source.gives) == inside
        once = counts[call.key[0]] == counts[source.key[0]] == 1 and uses[id(conv.weight)] == 1
        if alone and once and norm.running_mean is not None and not (_hooked(conv) or _hooked(norm)):
            pairs.append((source.key[0], call.key[0]))
    return pairs


@contextmanager
def folded(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Inside, the convolutions do the norms' work in eval mode and the norms do nothing."""
    before: list[tuple[Any, Any, Any]] = []
    norms: list[Any] = []
    try:
        fold(model, pairs, before, norms)
        yield
    finally:
        for conv, weight, bias in before:
            conv.weight, conv.bias = weight, bias
        for norm in norms:
            del norm.__dict__["forward"]


@torch.no_grad()
def fold(
    model: nn.Module, pairs: Sequence[tuple[str, str]], before: list[tuple[Any, Any, Any]], norms: list[Any]
) -> None:
    """What :func:`folded` does, for good; notes what was there before, and the norms."""
    modules: dict[str, Any] = dict(model.named_modules())
    for conv_path, norm_path in pairs:
        conv, norm = modules[conv_path], modules[norm_path]
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale
        shift = shift if norm.bias is None else shift + norm.bias
        before.append((conv, conv.weight, conv.bias))
        weight = conv.weight * scale.view(-1, *[1] * (conv.weight.ndim - 1))
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(shift, requires_grad=False)
        norm.__dict__["forward"] = _same
        norms.append(norm)


def _same(x: Tensor) -> Tensor:
    return x


def _is(modules: dict[str, nn.Module], call: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    return type(modules[call.key[0]]) in kinds


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
