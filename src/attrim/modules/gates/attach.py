"""Hooks that put gates into a network for the time of a block, and what is collected there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from attrim.errors import InputError
from attrim.modules.gates.kinds import SpatialChannelGate
from attrim.modules.gates.places import Place

if TYPE_CHECKING:
    from attrim.modules.gates.gates import Gates

__all__ = ["Collected", "Watch", "attach"]

Watch: TypeAlias = Callable[[Place, Tensor], None]
"""Called with a place and its tensor before it is gated."""


class Collected:
    """What the gates gave in the latest forward pass; live tensors, emptied when the next pass begins.

    Attributes:
        logits: group -> tensors ``(B, size)``, one for each time that one of its places ran, in the order of execution.
        attention: group -> the factors, likewise.
        pooled: group -> what the gates saw: means of the ungated channels, ``(B, size)`` (absent for ``fbs``, ``sca``).
        places: group -> the layer that each entry belongs to.
    """

    def __init__(self) -> None:
        self.logits: dict[str, list[Tensor]] = {}
        self.attention: dict[str, list[Tensor]] = {}
        self.pooled: dict[str, list[Tensor]] = {}
        self.places: dict[str, list[Place]] = {}

    def clear(self) -> None:
        """Forget everything."""
        for store in (self.logits, self.attention, self.pooled, self.places):
            store.clear()

    def add(self, place: Place, logits: Tensor | None, attention: Tensor, pooled: Tensor | None) -> None:
        """Note one call."""
        if logits is not None:
            self.logits.setdefault(place.group, []).append(logits)
        if pooled is not None:
            self.pooled.setdefault(place.group, []).append(pooled)
        self.attention.setdefault(place.group, []).append(attention)
        self.places.setdefault(place.group, []).append(place)


@contextmanager
def attach(
    gates: Gates, model: nn.Module, fixed: Mapping[str, Tensor] | None, watch: Watch | None, inplace: bool
) -> Iterator[Collected]:
    """Hang the gates into ``model``; nothing is left behind, also after an error."""
    modules = dict(model.named_modules())
    collected = Collected()
    handles: list[Any] = []
    lines = [
        _Line(gates, place, collected, fixed, watch, inplace and _gives_its_own(modules, place))
        for places in gates.places.values()
        for place in places
    ]

    def begin(module: nn.Module, args: Any) -> None:
        collected.clear()
        for line in lines:
            line.reset()

    def end(module: nn.Module, args: Any, out: Any) -> None:
        for line in lines:
            line.check()

    try:
        handles.append(model.register_forward_pre_hook(begin))
        for line in lines:
            for path in (line.place.source, *line.place.chain):
                if path not in modules:
                    raise InputError(
                        f"the gates were made for another network: there is no module '{path}'. Make them for this one: "
                        "Gates(model, attrim.trace(model, example_inputs))."
                    )
                if line.place.before:
                    handles.append(modules[path].register_forward_pre_hook(line.enter))
                else:
                    handles.append(modules[path].register_forward_hook(line.hook(path)))
        handles.append(model.register_forward_hook(end))
        yield collected
    finally:
        for handle in handles:
            handle.remove()
        for line in lines:
            line.reset()
        collected.clear()


class _Line:
    """Follows one layer's output through its chain and gates it at the end."""

    def __init__(
        self,
        gates: Gates,
        place: Place,
        collected: Collected,
        fixed: Mapping[str, Tensor] | None,
        watch: Watch | None,
        inplace: bool,
    ) -> None:
        self.place, self.collected, self.watch, self.inplace = place, collected, watch, inplace
        self.gate = gates.gate_of(place)
        self.fixed = None if fixed is None else fixed.get(place.group)
        self.off = fixed is not None and self.fixed is None
        self.begun, self.done = 0, 0
        self.waiting: Tensor | None = None
        self.input: Tensor | None = None

    def reset(self) -> None:
        self.begun = self.done = 0
        self.waiting = self.input = None

    def check(self) -> None:
        self.waiting = self.input = None
        if self.done == self.begun:
            return
        raise InputError(
            f"the output of '{self.place.source}' does not go straight through {' and '.join(self.place.chain)}, where the "
            f"gate of group '{self.place.group}' hangs. Show the gates a batch, so that they see what follows what: "
            "Gates(model, channels, example=batch)."
        )

    def hook(self, path: str) -> Callable[[nn.Module, Any, Any], Any]:
        place, last = self.place, path == self.place.module

        def call(module: nn.Module, args: Any, out: Any) -> Any:
            if path == place.source:
                if not isinstance(out, Tensor):
                    raise InputError(f"'{path}' gives {type(out).__name__}, no tensor, and cannot be gated.")
                self.begun += 1
                if self.gate.sees == "input":
                    self.input = args[0]
            elif not args or args[0] is not self.waiting:
                return None
            if not last:
                self.waiting = out
                return None
            self.waiting = None
            self.done += 1
            return None if self.off else self.apply(out)

        return call

    def enter(self, module: nn.Module, args: Any) -> Any:
        """Gate what a layer reads."""
        if not args or not isinstance(args[0], Tensor):
            raise InputError(
                f"'{self.place.source}' was called without a positional tensor, so its input cannot be gated."
            )
        if self.off:
            return None
        if self.place.dim < 0:
            self.place = replace(self.place, dim=args[0].ndim + self.place.dim)
        self.input = args[0] if self.gate.sees == "input" else None
        return (self.apply(args[0]), *args[1:])

    def apply(self, x: Tensor) -> Tensor:
        place, gate = self.place, self.gate
        if self.watch is not None:
            self.watch(place, x)
        if self.fixed is not None:
            attention = self.fixed.to(x.device, x.dtype).expand(x.shape[0], -1) if self.fixed.ndim == 1 else self.fixed
            self.collected.add(place, None, attention, None)
            return _scaled(x, attention, place, self.inplace)
        if isinstance(gate, SpatialChannelGate):
            return self._by_map(x, gate)
        pooled = _input_means(self.input, place) if gate.sees == "input" else channel_means(x, place)
        self.input = None
        logits, attention = gate(pooled)
        self.collected.add(place, logits, attention, None if gate.sees == "input" else pooled)
        return _scaled(x, attention, place, self.inplace)

    def _by_map(self, x: Tensor, gate: SpatialChannelGate) -> Tensor:
        place = self.place
        moved = x.movedim(place.dim, 1)
        index = torch.as_tensor(place.index, device=x.device)
        maps = moved[:, index.reshape(-1)].reshape(x.shape[0], len(index), -1)
        weighted = gate.spatial(maps)
        logits, attention = gate(weighted)
        self.collected.add(place, logits, attention, None)
        result = (weighted * attention[:, :, None]).reshape(x.shape[0], index.numel(), *moved.shape[2:])
        return moved.index_copy(1, index.reshape(-1), result).movedim(1, place.dim)


def channel_means(x: Tensor, place: Place) -> Tensor:
    """Mean of each of the group's channels for each sample, ``(B, size)``, over all positions that it owns."""
    axes = [d for d in range(1, x.ndim) if d != place.dim]
    means = x.mean(axes) if axes else x
    if _all_in_order(place, x.shape[place.dim]):
        return means
    index = torch.as_tensor(place.index, device=x.device)
    return means[:, index].mean(2)


def _input_means(x: Tensor | None, place: Place) -> Tensor:
    if x is None:
        raise InputError(f"'{place.source}' was called without a positional input; kind='fbs' needs to see it.")
    dim = x.ndim + place.input_dim
    axes = [d for d in range(1, x.ndim) if d != dim]
    return x.mean(axes) if axes else x


def _scaled(x: Tensor, attention: Tensor, place: Place, inplace: bool) -> Tensor:
    """``x`` times the attention ``(B, size)``, at the positions of the group."""
    width = x.shape[place.dim]
    if not _all_in_order(place, width):
        spread = attention.new_ones(attention.shape[0], width)
        index = torch.as_tensor(place.index, device=x.device)
        values = attention[:, :, None].expand(-1, -1, index.shape[1]).reshape(attention.shape[0], -1)
        attention = spread.index_copy(1, index.reshape(-1), values)
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[place.dim] = width
    factors = attention.view(shape)
    if inplace and not torch.is_grad_enabled():
        return x.mul_(factors)  # a new tensor of this size costs more than the multiplication
    return x * factors


def _gives_its_own(modules: Mapping[str, nn.Module], place: Place) -> bool:
    """Whether the gated module is one of torch's that never hands on a tensor that somebody else holds."""
    module = None if place.before else modules.get(place.module)
    fresh = isinstance(module, (_ConvNd, nn.Linear, _NormBase, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish))
    return fresh and type(module).__module__.startswith("torch.nn.modules")


def _all_in_order(place: Place, width: int) -> bool:
    return place.in_order and len(place.index) == width
