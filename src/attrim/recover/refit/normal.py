"""Mean inputs of contractions without data: batch norm says how its outputs are distributed, and functions of them follow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrim.modules.course.chain import Norm, step_of
from attrim.modules.course.contractions import Contraction, ContractionWatch
from attrim.modules.course.survey import is_flipped
from attrim.modules.names import named_tensors

__all__ = ["NormalWatch"]

_NODES = 256
"""Points of the quadrature; a kink such as ReLU's is then met within about 1e-3 of the standard deviation."""

_MOVES = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand"}
)
_MOVES |= frozenset({"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "clone", "detach", "alias"})
_MOVES |= frozenset({"contiguous", "_to_copy", "flatten", "cat"})
_AVERAGES = frozenset(
    {"mean", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"}
)
_AVERAGES |= frozenset({"adaptive_avg_pool1d"})

_UNTAGGED = frozenset({"hardswish", "_prelu_kernel", "rsub"})
"""Elementwise operators that ATen does not mark as such."""


@dataclass(frozen=True, slots=True, eq=False)
class _Spread:
    """How the entries of a tensor are distributed.

    Attributes:
        nodes: ``(kinds, nodes)``, float64: values of each kind of entry at the points of the quadrature.
        kind: which kind each entry is, int64, in the shape of the tensor.
        root: what they are functions of; functions of one root can be taken together point by point.
        averaged: whether the entries are averages, so that only their mean is known.
    """

    nodes: Tensor
    kind: Tensor
    root: object
    averaged: bool = False


class NormalWatch(ContractionWatch):  # type: ignore[no-untyped-call]
    """While active, calls ``tell`` for every contraction whose inputs are elementwise functions of batch-norm outputs.

    A batch norm's output is taken as normal with mean ``bias`` and variance ``weight² · var / (var + eps)``; elementwise
    operators act on the nodes of a Gauss-Hermite quadrature, movements and concatenations on the numbers of the kinds,
    and plain averages over positions keep the mean. Everything else (max pooling, products and sums of different
    branches, layer norm) ends the trail.

    Args:
        model: in eval mode.
        weights: name -> weight of the contractions to look at.
        tell: gets the contraction with each input replaced by its mean, in float64.

    Source:
        The idea of data-free means from batch-norm statistics: Nagel et al., "Data-Free Quantization Through Weight
        Equalization and Bias Correction", ICCV 2019, section 4.2.1 (closed form for ReLU; here for any function).
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], tell: Callable[[Contraction], None]) -> None:
        super().__init__(weights, self._note)
        self._constants = {t.untyped_storage().data_ptr() for t in named_tensors(model).tensors.values()}
        self._tell = tell
        self._seen: list[Contraction] = []
        self._spreads: dict[int, tuple[weakref.ref[Tensor], _Spread]] = {}
        points, shares = np.polynomial.hermite_e.hermegauss(_NODES)
        self._points, self._shares = torch.from_numpy(points), torch.from_numpy(shares / shares.sum())

    def _note(self, use: Contraction) -> None:
        self._seen.append(use)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._seen.clear()
        spreads = self._after(func, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for use in self._seen:
            self._meet(use, func.overloadpacket.__name__, args)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self._forget(args[0])
        self._remember(func, args, kwargs, result, spreads)
        return result

    def _after(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Spread (or list of spreads) of what an operator returns, where its inputs tell it."""
        name = func.overloadpacket.__name__
        inputs = [a for value in args for a in (value if isinstance(value, list | tuple) else (value,))]
        found = {id(a): self._spread(a) for a in inputs if isinstance(a, Tensor)}
        if all(spread is None for spread in found.values()):
            return None
        if name == "cat":
            return _joined(args, kwargs, list(found.values()))
        first = self._spread(args[0]) if args and isinstance(args[0], Tensor) else None
        if name in _MOVES and first is not None:
            moved = _moved(func, first.kind, args[1:], kwargs)
            return (
                [replace(first, kind=m) for m in moved]
                if isinstance(moved, list | tuple)
                else replace(first, kind=moved)
            )
        if name in _AVERAGES and first is not None:
            return first
        if _is_elementwise(func):
            return self._elementwise(func, args, kwargs)
        return None

    def _elementwise(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Spread | None:
        known = [s for a in args if isinstance(a, Tensor) and (s := self._spread(a)) is not None]
        first = known[0] if known else None
        if first is None or any(s.averaged or s.root is not first.root for s in known):
            return None
        if any(s.kind.shape != first.kind.shape or not torch.equal(s.kind, first.kind) for s in known[1:]):
            return None
        moved: list[Any] = []
        for value in args:
            if not isinstance(value, Tensor):
                moved.append(value)
                continue
            spread = self._spread(value)
            nodes = spread.nodes.clone() if spread is not None else self._constant(value, first)
            if nodes is None:
                return None
            moved.append(nodes)
        if any(isinstance(value, Tensor) for value in kwargs.values()):
            return None
        nodes = func(*moved, **kwargs)
        return replace(first, nodes=nodes) if nodes.shape == first.nodes.shape and nodes.is_floating_point() else None

    def _constant(self, value: Tensor, partner: _Spread) -> Tensor | None:
        """A parameter or buffer beside ``partner``: one number for each kind of entry, or None."""
        if value.untyped_storage().data_ptr() not in self._constants:
            return None
        try:
            wide = value.detach().double().expand(partner.kind.shape)
        except RuntimeError:
            return None
        each = torch.zeros(len(partner.nodes), dtype=torch.float64, device=value.device)
        each[partner.kind.flatten()] = wide.flatten()
        return each[:, None] if torch.equal(each[partner.kind], wide) else None

    def _remember(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, spreads: Any) -> None:
        value = result[0] if isinstance(result, tuple) and result else result
        if args and isinstance(args[0], Tensor) and isinstance(value, Tensor):
            step = step_of(func, args, kwargs, args[0], self._constants)
            if step is not None and step.kind == "norm":
                spreads, result = self._normal(step.norm, value), value
        if spreads is None:
            return
        pairs = zip(result, spreads, strict=True) if isinstance(spreads, list) else [(value, spreads)]
        averages = func.overloadpacket.__name__ in _AVERAGES
        for tensor, spread in pairs:
            known = _average(spread, args, tensor, func.overloadpacket.__name__) if averages else spread
            if known is not None and known.kind.shape == tensor.shape:
                self._spreads[id(tensor)] = weakref.ref(tensor), known

    def _normal(self, norm: Norm, value: Tensor) -> _Spread:
        """Of a batch norm's output."""
        var = norm.var.detach().double()
        width = (var / (var + norm.eps)).sqrt()
        if norm.weight is not None:
            width = width * norm.weight.detach().double()
        centre = torch.zeros_like(width) if norm.bias is None else norm.bias.detach().double()
        nodes = centre[:, None] + width[:, None] * self._points.to(width.device)
        shape = [1, -1, *[1] * (value.ndim - 2)]
        return _Spread(nodes, torch.arange(len(width), device=width.device).view(shape).expand(value.shape), object())

    def _spread(self, tensor: Tensor) -> _Spread | None:
        ref, spread = self._spreads.get(id(tensor), (None, None))
        return spread if ref is not None and ref() is tensor else None

    def _forget(self, changed: Tensor) -> None:
        """Nothing is known any more about tensors that share memory with one that was changed."""
        address = changed.untyped_storage().data_ptr()
        for key, (ref, _) in list(self._spreads.items()):
            tensor = ref()
            if tensor is None or tensor.untyped_storage().data_ptr() == address:
                del self._spreads[key]

    def _meet(self, use: Contraction, name: str, args: tuple[Any, ...]) -> None:
        flipped = is_flipped(use, args, name)
        value = args[(name == "addmm") + flipped]
        spread = self._spread(value)
        if spread is None:
            return
        kind = spread.kind
        if name != "convolution":
            kind = kind.flatten(0, -2)
            kind = kind.T if flipped else kind
        means = (spread.nodes @ self._shares.to(spread.nodes.device))[kind]
        self._tell(replace(use, inputs=means.reshape(use.inputs.shape)))


def _is_elementwise(func: Any) -> bool:
    """Whether ATen says so, of the operator or of the one that does not work in place; random ones are not meant."""
    name = func.overloadpacket.__name__
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    plain = name.rstrip("_")
    if torch.Tag.pointwise in func.tags or plain in _UNTAGGED:
        return True
    twin = getattr(torch.ops.aten, plain, None) if func._schema.is_mutable else None
    return twin is not None and any(torch.Tag.pointwise in getattr(twin, o).tags for o in twin.overloads())


def _moved(func: Any, kind: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A movement of the numbers of the kinds, whose layout in memory is another than that of the values."""
    name = func.overloadpacket.__name__
    if name == "_to_copy":
        return kind
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        return kind.reshape(args[0])
    return func(kind, *args, **kwargs)


def _joined(args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: list[_Spread | None]) -> _Spread | None:
    """Of a concatenation, if it is known of every part."""
    known = [part for part in parts if part is not None]
    if len(known) != len(args[0]):
        return None
    begins = np.cumsum([0, *(len(part.nodes) for part in known)]).tolist()
    kinds = [part.kind + begin for part, begin in zip(known, begins[:-1], strict=True)]
    averaged = any(part.averaged for part in known)
    kind = torch.cat(kinds, *args[1:], **kwargs)
    return _Spread(torch.cat([part.nodes for part in known]), kind, object(), averaged)


def _average(spread: _Spread, args: tuple[Any, ...], value: Tensor, name: str) -> _Spread | None:
    """Of an average over positions: each entry has the mean that those it was taken from have."""
    kind = spread.kind
    if name.startswith("avg_pool") and len(args) > 3 and any(np.atleast_1d(args[3])):
        return None  # zero padding takes part in the average
    positions = kind.flatten(2) if kind.ndim > 2 else kind[:, :, None]
    if not torch.equal(positions, positions[:, :, :1].expand_as(positions)):
        return None
    if name == "mean":
        dims = {d % kind.ndim for d in args[1]} if len(args) > 1 and args[1] else set(range(kind.ndim))
        if dims & {0, 1}:
            return None
    each = positions[:, :, 0]
    return replace(spread, kind=each.view(*each.shape, *[1] * (value.ndim - 2)).expand(value.shape), averaged=True)
