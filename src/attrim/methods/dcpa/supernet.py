"""The weight-sharing network: the user's model with masks on the weights that read the searched channels.

A channel counts as removed when every weight that reads it finds zero there. Multiplying the weight by the mask does just
that: ``conv(x ⊙ m, W) = conv(x, W ⊙ m)``, with the same gradients. It touches a few thousand numbers instead of every
activation, and is right for depthwise layers, concatenations and residual streams alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from attrim.core.channels import ChannelGroup, Member
from attrim.core.cost import IntArray
from attrim.errors import InputError
from attrim.methods.dcpa.sample import Draw
from attrim.methods.dcpa.widths import SearchSpace
from attrim.modules.names import named_tensors

__all__ = ["Supernet", "readers"]

_LINEAR = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, _ConvNd, nn.Linear)
"""Layers whose output is a linear function of their own weight and bias."""


class Supernet:
    """Runs a model as one of the networks of a search space. The model's class and tensors are untouched.

    Args:
        model: the network; masks are on it only inside :meth:`masked`.
        space: what is searched.

    Raises:
        InputError: a searched group is read by a module whose weights cannot be exchanged (a recurrent layer).

    Example:
        >>> supernet = Supernet(model, space)
        >>> with supernet.masked(policy.sample(None)):
        ...     outputs = model(images)
    """

    def __init__(self, model: nn.Module, space: SearchSpace) -> None:
        self.space = space
        named = named_tensors(model)
        modules = dict(model.named_modules())
        self._axes: dict[str, list[tuple[int, IntArray]]] = {}
        self._mixed: dict[str, list[Member]] = {g: list(readers(space.channels[g])) for g in space.groups}
        for group in space.groups:
            for member in self._mixed[group]:
                name, dim = member.axis.tensor, member.axis.dim
                rows = self._axes.setdefault(name, [])
                place = next((row for d, row in rows if d == dim), None)
                if place is None:
                    place = np.full(space.channels.shapes[name][dim], space.size, np.int64)
                    rows.append((dim, place))
                place[member.index] = space.offsets[group] + np.arange(len(member.index))[:, None]
        self._index: dict[torch.device, dict[str, list[tuple[int, Tensor]]]] = {}
        self._homes: dict[str, list[tuple[Any, str]]] = {}
        for other, name in (*((n, n) for n in self._axes), *named.aliases.items()):
            if name in self._axes:
                path, _, leaf = other.rpartition(".")
                if isinstance(modules[path], nn.RNNBase):
                    raise InputError(
                        f"'{other}' belongs to a recurrent layer, whose width cannot be searched. Freeze it."
                    )
                self._homes.setdefault(name, []).append((modules[path], leaf))
        self._gated: dict[str, list[int]] = {}
        self._hooked: list[tuple[nn.Module, int]] = []
        gates = {branch.id: branch.gate for branch in space.channels.branches}
        for u, unit in enumerate(space.units):
            if unit.branch is not None:
                self._gate(gates[unit.branch], u, modules, set(named.aliases) | set(named.aliases.values()))
        self._active = False

    @contextmanager
    def masked(self, draw: Draw) -> Iterator[None]:
        """A block in which the model is the drawn network; afterwards its own tensors are back, also after an error.

        Raises:
            InputError: the blocks are nested.
        """
        if self._active:
            raise InputError("the model is masked already; leave the first block before.")
        self._active = True
        own: list[tuple[Any, str, Any]] = []
        handles: list[Any] = []
        try:
            flat = torch.cat([draw.mask, draw.mask.new_ones(1)])
            weights = {name: self._weight(name, flat, draw) for name in self._homes}
            handles = [module.register_forward_hook(_times(draw.gates[u])) for module, u in self._hooked]
            for name, homes in self._homes.items():
                for module, leaf in homes:
                    store = module._parameters if leaf in module._parameters else module._buffers
                    own.append((store, leaf, store[leaf]))
                    store[leaf] = weights[name]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for store, leaf, tensor in own:
                store[leaf] = tensor
            self._active = False

    def _weight(self, name: str, flat: Tensor, draw: Draw) -> Tensor:
        module, leaf = self._homes[name][0]
        weight: Tensor = getattr(module, leaf)
        for group, matrix in draw.mixes.items():
            for member in self._mixed[group]:
                if member.axis.tensor == name:
                    weight = _mixed(weight, member, matrix)
        factors: Tensor | None = None
        for u in self._gated.get(name, ()):
            gate = draw.gates[u].to(weight.device, weight.dtype)
            factors = gate if factors is None else factors * gate
        for dim, index in self._indices(flat.device).get(name, ()):
            shape = [1] * weight.ndim
            shape[dim] = -1
            own = flat[index].to(weight.device, weight.dtype).view(shape)
            factors = own if factors is None else factors * own
        return weight if factors is None else weight * factors

    def _gate(self, path: str, u: int, modules: Mapping[str, nn.Module], tied: set[str]) -> None:
        """Note where a branch's output is multiplied: in the weights of its last layer where that is the same."""
        module = modules[path]
        last, end = module, path
        while type(last) is nn.Sequential and len(last):
            end = f"{end}.{len(last) - 1}" if f"{end}.{len(last) - 1}" in modules else ""
            last = modules.get(end, nn.Identity())
        names = [f"{end}.{leaf}" for leaf, _ in last.named_parameters(recurse=False)]
        plain = isinstance(last, _LINEAR) and type(last).__module__.startswith("torch.nn.modules")
        if not plain or f"{end}.weight" not in names or tied & set(names):
            self._hooked.append((module, u))
            return
        for name in names:
            self._gated.setdefault(name, []).append(u)
            if name not in self._homes:
                self._homes[name] = [(last, name.rpartition(".")[2])]

    def _indices(self, device: torch.device) -> Mapping[str, Sequence[tuple[int, Tensor]]]:
        if device not in self._index:
            self._index[device] = {
                name: [(dim, torch.from_numpy(row).to(device)) for dim, row in rows]
                for name, rows in self._axes.items()
            }
        return self._index[device]


def _times(gate: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def scale(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (out[0] * gate.to(out[0].dtype), *out[1:])
        return out * gate.to(out.dtype)

    return scale


def readers(group: ChannelGroup) -> Sequence[Member]:
    """The axes that are masked to remove channels: of the weights that read them, or, where none does (the queries and
    keys of attention meet each other), of everything that makes them."""
    found = group.with_role("in")
    return found or group.with_role("out", "scale", "shift", "param")


def _mixed(weight: Tensor, member: Member, matrix: Tensor) -> Tensor:
    """``W'_d = Σ_c W_c A[c', d]``: the weight on the channels themselves that acts like ``W`` on their mixture."""
    index = torch.from_numpy(member.index).to(weight.device)
    moved = weight.movedim(member.axis.dim, -1)
    picked = moved[..., index]
    mixed = torch.einsum("...ck,cd->...dk", picked, matrix.to(weight.dtype)).flatten(-2)
    return moved.index_copy(-1, index.reshape(-1), mixed).movedim(-1, member.axis.dim)
