"""Watching contractions: which weights multiply what, seen where the operators run.

Convolutions and matrix products are recognised at the dispatcher by the storage of their weight, so functional calls,
packed attention projections and shared modules are seen exactly like ``nn.Conv2d`` and ``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Contraction", "ContractionWatch", "patches"]

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """One call of an operator that contracts an axis of a watched weight.

    Attributes:
        tensor: name of the weight.
        dim: the contracted dimension of the weight.
        offset: where in the weight's storage the part that was used begins (packed projections use one part a call).
        weight: the weight as ``(blocks, rows, columns, taps)``; ``columns`` runs along ``dim``, blocks are the groups
            of a convolution.
        inputs: the operator's input as ``(samples, blocks, columns, positions)``.
        window: of a convolution: kernel, stride, padding, dilation; None when every position is used by itself.
        outputs: output positions per sample.
    """

    tensor: str
    dim: int
    offset: int
    weight: Tensor
    inputs: Tensor
    window: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]] | None
    outputs: int


class ContractionWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, calls ``see`` for every contraction with one of the watched weights."""

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[Contraction], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights.items():
            self._by_storage.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight.detach()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is _aten.convolution:
            self._convolution(args, result)
        elif packet is _aten.mm or packet is _aten.bmm:
            self._product(args[0], args[1])
        elif packet is _aten.addmm:
            self._product(args[1], args[2])
        return result

    def _find(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        for name, weight in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            start = weight.storage_offset()
            if start <= tensor.storage_offset() < start + weight.numel():
                return name, weight
        return None

    def _convolution(self, args: tuple[Any, ...], result: Tensor) -> None:
        inputs, weight, _, stride, padding, dilation, transposed, _, groups = args
        found = self._find(weight)
        if found is None or found[1].shape != weight.shape:
            return
        taps = weight[0, 0].numel()
        if transposed:
            blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], taps).transpose(1, 2)
        else:
            blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], taps)
        spatial = inputs.shape[2:]
        self._see(
            Contraction(
                tensor=found[0],
                dim=0 if transposed else 1,
                offset=int(weight.storage_offset()),
                weight=blocks,
                inputs=inputs.reshape(inputs.shape[0], groups, -1, *spatial),
                window=None if transposed else (weight.shape[2:], stride, padding, dilation),
                outputs=result[0, 0].numel(),
            )
        )

    def _product(self, left: Tensor, right: Tensor) -> None:
        if left.ndim == 3:
            if left.shape[0] != 1:
                return
            left, right = left[0], right[0]
        found = self._find(right)
        if found is None:
            left, right = right.T, left.T
            found = self._find(right)
        if found is None or found[1].ndim != 2:
            return
        name, weight = found
        dims = [d for d in (0, 1) if weight.stride(d) == right.stride(0) and weight.shape[d] == right.shape[0]]
        if not dims:
            return
        self._see(
            Contraction(
                tensor=name,
                dim=dims[-1],
                offset=int(right.storage_offset()),
                weight=right.T[None, :, :, None],
                inputs=left.reshape(left.shape[0], 1, -1, 1),
                window=None,
                outputs=1,
            )
        )


def patches(use: Contraction) -> Tensor:
    """What each tap of a convolution reads: ``(samples, blocks, columns, positions…)`` to
    ``(blocks, columns · taps, samples · outputs)``, zero padding included."""
    inputs = use.inputs
    if use.window is None:
        return inputs.flatten(3).permute(1, 2, 0, 3).flatten(2)
    rank = len(use.window[0])
    kernel, stride, padding, dilation = (list(v) * (rank if len(v) == 1 else 1) for v in use.window)
    inputs = torch.nn.functional.pad(inputs, [p for size in reversed(padding) for p in (size, size)])
    for d, (taps, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        inputs = inputs.unfold(3 + d, (taps - 1) * gap + 1, step)[..., ::gap]
    order = [1, 2, *range(3 + rank, 3 + 2 * rank), 0, *range(3, 3 + rank)]
    moved = inputs.permute(order)
    return moved.reshape(moved.shape[0], moved.shape[1] * int(torch.Size(kernel).numel()), -1)
