"""Sparse training: penalties that empty channels before they are cut, so that the cut costs little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelGroup, ChannelMap
from attrim.core.cost import IntArray
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import CriterionError, InputError, PlanError
from attrim.modules.names import named_tensors

__all__ = ["ROLES", "ChannelEnergy", "GroupLasso", "GrowingL2"]

ROLES = ("out", "in", "scale", "shift")
"""Members whose entries are penalised: all parameters of a channel, no buffers."""

_Overlap = tuple[str, tuple[int, ...], tuple[IntArray, ...], int, int]
"""Tensor, its dimensions in one group, their indices, number of the group's first channel, sign."""


class ChannelEnergy:
    """Sum of squares of all entries that belong to a channel, for every channel of a network at once.

    A channel's entries are its positions on every member axis, over the whole of the other axes. An entry on two axes of
    the same channel (the diagonal of a convolution behind a shortcut) counts once, a tied tensor too.

    Args:
        channels: the map of the network.
        roles: which members take part.

    Attributes:
        offsets: group id -> number of its first channel in the result.
        counts: shape ``(C,)``, entries of each channel.

    Example:
        >>> energy = ChannelEnergy(channels); energy(model)[energy.offsets["conv1"]]
    """

    def __init__(self, channels: ChannelMap, roles: tuple[str, ...] = ROLES) -> None:
        self.offsets: dict[str, int] = {}
        self._shapes = channels.shapes
        self._dims: dict[str, list[int]] = {}
        self._overlaps: list[_Overlap] = []
        if not len(channels):
            raise InputError(
                "nothing in this network can be pruned, so there is nothing to penalise. See channels.pinned."
            )
        total = 0
        found: list[tuple[str, int, IntArray, int]] = []
        for group in channels:
            self.offsets[group.id] = total
            for (tensor, dim), index in _indices(group, roles).items():
                found.append((tensor, dim, index, total))
                dims = self._dims.setdefault(tensor, [])
                if dim not in dims:
                    dims.append(dim)
            self._overlaps += _overlaps(group, roles, total)
            total += group.size
        self.size = total
        starts = self._starts()
        places = [(starts[tensor, dim] + index).ravel() for tensor, dim, index, _ in found]
        owners = [np.repeat(first + np.arange(len(index)), index.shape[1]) for _, _, index, first in found]
        self._places = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places]))
        self._owners = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *owners]))
        self._near: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.counts = self._counts(found)

    def __call__(self, model: nn.Module) -> Tensor:
        """The sums, shape ``(C,)``, differentiable.

        Raises:
            InputError: the map was traced from another model.
        """
        tensors = tensors_like(model, self._shapes, list(self._dims))
        sums = [part for name, dims in self._dims.items() for part in _axis_sums(tensors[name].square(), dims)]
        if not sums:
            raise InputError("no channel group has a parameter to penalise; expected a network that can be pruned.")
        device = sums[0].device
        flat = torch.cat([part.to(device) for part in sums])
        if device not in self._near:
            self._near[device] = self._places.to(device), self._owners.to(device)
        places, owners = self._near[device]
        result = flat.new_zeros(self.size).index_add(0, owners, flat[places])
        for name, dims, indices, first, sign in self._overlaps:
            shared = _diagonal(tensors[name], dims, indices).square().sum(1).to(device)
            result = result.index_add(0, torch.arange(first, first + len(shared), device=device), sign * shared)
        return result

    def _starts(self) -> dict[tuple[str, int], int]:
        """Where each axis begins when all lie one after the other."""
        starts, begin = {}, 0
        for tensor, dims in self._dims.items():
            for dim in dims:
                starts[tensor, dim] = begin
                begin += self._shapes[tensor][dim]
        return starts

    def _counts(self, found: list[tuple[str, int, IntArray, int]]) -> Tensor:
        counts = np.zeros(self.size, np.int64)
        for tensor, dim, index, first in found:
            shape = self._shapes[tensor]
            counts[first : first + len(index)] += index.shape[1] * (math.prod(shape) // shape[dim])
        for tensor, dims, indices, first, sign in self._overlaps:
            rest = math.prod(n for d, n in enumerate(self._shapes[tensor]) if d not in dims)
            counts[first : first + len(indices[0])] += sign * rest * math.prod(index.shape[1] for index in indices)
        return torch.from_numpy(counts)


class GroupLasso:
    """``strength · Σ_c γ_c · ‖W_c‖₂ / √n_c`` over all channels ``c`` of a network, with ``n_c`` entries in ``W_c``.

    The norm is not squared, so that whole channels go to zero together, on every member axis: producer, norm, consumer.
    Hand it to ``attrim.recover.finetune(regularizer=...)``, or add it to a loss of your own.

    Args:
        channels: the map of the network that is trained.
        strength: weight of the penalty, > 0.
        weights: None: every ``γ_c`` is 1. ``"importance"``: ``γ_c = 2^(a (I_max - I_c) / (I_max - I_min))`` within each
            group, with ``‖W_c‖`` of the moment as importance ``I_c``, so that weak channels are pressed more. Scores (from
            :func:`attrim.score`): the same with these; groups without scores have ``γ_c = 1``.
        spread: ``a``; the weakest channel is pressed ``2^a`` times as much as the strongest.

    Source:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, equation 4 (there with the squared norm);
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.

    Example:
        >>> penalty = GroupLasso(attrim.trace(model, example), 1e-2, "importance")
        >>> sparse = attrim.recover.finetune(model, batches, regularizer=penalty)
    """

    def __init__(
        self,
        channels: ChannelMap,
        strength: float,
        weights: Literal["importance"] | Scores | None = None,
        *,
        spread: float = 4.0,
    ) -> None:
        _positive("strength", strength)
        if not 0 <= spread < math.inf:
            raise InputError(f"spread: expected a number >= 0, found {spread!r}.")
        if weights is not None and weights != "importance" and not isinstance(weights, Scores):
            raise InputError(f"weights: expected None, 'importance' or Scores, found {weights!r}.")
        self.strength, self.spread = float(strength), float(spread)
        self._energy = ChannelEnergy(channels)
        self._root = self._energy.counts.clamp(min=1).double().sqrt()
        self._group = torch.repeat_interleave(torch.tensor([group.size for group in channels]))
        self._by_norm = weights == "importance"
        self._fixed = torch.ones(self._energy.size)
        if isinstance(weights, Scores):
            self._fixed = self._from_scores(channels, weights)

    def __call__(self, model: nn.Module, progress: float = 0.0) -> Tensor:
        """The penalty, a scalar. Zero channels have gradient zero.

        Args:
            model: the network in training.
            progress: not used; the strength is constant.
        """
        energy = self._energy(model)
        norms = torch.where(energy > 0, energy, 1).sqrt() * (energy > 0) / self._root.to(energy)
        weights = self._pressure(norms.detach()) if self._by_norm else self._fixed.to(energy)
        return self.strength * (weights * norms).sum()

    def _from_scores(self, channels: ChannelMap, scores: Scores) -> Tensor:
        values = torch.zeros(self._energy.size)
        for name, value in scores.values.items():
            if name not in channels.groups or len(value) != channels[name].size:
                raise CriterionError(
                    f"weights: the scores do not fit the channel map at group '{name}'. Score the same map: "
                    "attrim.score(model, channels, 'l2')."
                )
            values[self._energy.offsets[name] :][: len(value)] = value
        return self._pressure(values)

    def _pressure(self, importance: Tensor) -> Tensor:
        """``2^(a (I_max - I) / (I_max - I_min))`` within each group."""
        group = self._group.to(importance.device)
        edge = importance.new_zeros(int(group[-1]) + 1)
        high = edge.scatter_reduce(0, group, importance, "amax", include_self=False)[group]
        low = edge.scatter_reduce(0, group, importance, "amin", include_self=False)[group]
        return torch.exp2(
            self.spread * (high - importance) / (high - low).clamp(min=torch.finfo(importance.dtype).tiny)
        )


class GrowingL2:
    """``λ/2 · Σ w²`` over the entries that a plan will remove, with ``λ`` growing in steps up to ``ceiling``.

    What is doomed is pressed to zero while the rest of the network learns to do without it, so that the cut afterwards
    changes next to nothing. Each entry is counted once. The gradient is ``λ w``.

    Args:
        channels: the map of the network that is trained.
        plan: made for the same network, not yet applied.
        ceiling: ``λ`` in the end, > 0. A weight shrinks by about ``exp(-lr · λ · steps)``; 1 to 10 are usual.
        every: share of the run between two steps of ``λ``, in (0, 1]; ``λ`` is ``every · ceiling`` at first.

    Raises:
        PlanError: the plan was made for another network, or removes nothing.

    Source:
        Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021 (GReg-1).

    Example:
        >>> channels = attrim.trace(model, example)
        >>> plan = attrim.allocate(channels, attrim.score(model, channels, "l2"), attrim.Budget(macs=0.5))
        >>> ready = attrim.recover.finetune(model, batches, regularizer=GrowingL2(channels, plan, ceiling=5.0))
        >>> small = attrim.apply(ready, plan)
    """

    def __init__(self, channels: ChannelMap, plan: PruningPlan, ceiling: float, every: float = 0.05) -> None:
        _positive("ceiling", ceiling)
        if not 0 < every <= 1:
            raise InputError(f"every: expected a share of the run in (0, 1], found {every!r}.")
        if plan.fingerprint != channels.fingerprint:
            raise PlanError(
                "the plan was made for another network than the channel map. Allocate on this map: "
                "plan = attrim.allocate(channels, scores, budget)."
            )
        self.ceiling, self.every = float(ceiling), float(every)
        self._shapes = channels.shapes
        self._doomed = _doomed(channels, plan)
        if not self._doomed:
            raise PlanError("the plan removes nothing, so there is nothing to press to zero. Choose a smaller budget.")

    def strength(self, progress: float) -> float:
        """``λ`` at this share of the run."""
        steps = math.floor(progress / self.every + 1e-9) + 1
        return self.ceiling * min(1.0, steps * self.every)

    def __call__(self, model: nn.Module, progress: float) -> Tensor:
        """The penalty, a scalar.

        Args:
            model: the network in training, not yet cut.
            progress: share of the run that is done, in [0, 1].

        Raises:
            InputError: the model has been cut already, or is another one.
        """
        total: Tensor | None = None
        for name, tensor in tensors_like(model, self._shapes, list(self._doomed)).items():
            mask = self._doomed[name]
            if mask.device != tensor.device:
                mask = self._doomed[name] = mask.to(tensor.device)
            part = (tensor * mask).square().sum()
            total = part if total is None else total + part.to(total.device)
        if total is None:
            raise InputError("the plan removes no parameter.")
        return 0.5 * self.strength(progress) * total


def tensors_like(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], names: list[str]) -> dict[str, Tensor]:
    """The named tensors of a model, after checking their shapes.

    Raises:
        InputError: one is missing or has another shape.
    """
    tensors = named_tensors(model).tensors
    for name in names:
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shapes[name]):
            raise InputError(
                f"the penalty belongs to another model: expected '{name}' with shape {tuple(shapes[name])}, found "
                f"{found or 'no such tensor'}. Trace the model that is trained: attrim.trace(model, example_inputs)."
            )
    return {name: tensors[name] for name in names}


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name}: expected a number > 0, found {value!r}.")


def _indices(group: ChannelGroup, roles: tuple[str, ...]) -> dict[tuple[str, int], IntArray]:
    """Axis -> positions of each channel; an axis that plays several roles comes once."""
    found: dict[tuple[str, int], IntArray] = {}
    for member in group.with_role(*roles):
        found.setdefault((member.axis.tensor, member.axis.dim), member.index)
    return found


def _overlaps(group: ChannelGroup, roles: tuple[str, ...], first: int) -> list[_Overlap]:
    """Inclusion and exclusion for tensors with several axes in the group."""
    axes: dict[str, list[tuple[int, IntArray]]] = {}
    for (tensor, dim), index in _indices(group, roles).items():
        axes.setdefault(tensor, []).append((dim, index))
    return [
        (tensor, tuple(dim for dim, _ in some), tuple(index for _, index in some), first, (-1) ** (count + 1))
        for tensor, there in axes.items()
        for count in range(2, len(there) + 1)
        for some in combinations(there, count)
    ]


def _diagonal(tensor: Tensor, dims: tuple[int, ...], indices: tuple[IntArray, ...]) -> Tensor:
    """The entries that lie at a channel's positions on all of ``dims``; shape ``(channels, entries)``."""
    places = []
    for at, index in enumerate(indices):
        shape = [1] * len(indices)
        shape[at] = index.shape[1]
        places.append(torch.from_numpy(index).to(tensor.device).view(len(index), *shape))
    return tensor.movedim(dims, tuple(range(len(dims))))[tuple(places)].flatten(1)


def _axis_sums(squares: Tensor, dims: list[int]) -> list[Tensor]:
    """Sums over all but one of ``dims``, for each of them."""
    rest = [d for d in range(squares.ndim) if d not in dims]
    if rest:
        squares = squares.sum(rest, keepdim=True)
    parts = []
    for dim in dims:
        others = [d for d in dims if d != dim]
        parts.append((squares.sum(others) if others else squares).flatten())
    return parts


def _doomed(channels: ChannelMap, plan: PruningPlan) -> dict[str, Tensor]:
    """Parameter -> mask of the entries that the plan removes."""
    axes = {(m.axis.tensor, m.axis.dim) for group in channels for m in group.with_role(*ROLES)}
    masks: dict[str, Tensor] = {}
    for name, cut in plan.cuts.items():
        for dim, kept in cut.keep.items():
            if (name, dim) not in axes:
                continue
            gone = torch.ones(cut.shape_before[dim], dtype=torch.bool)
            gone[list(kept)] = False
            wide = gone.view(*(-1 if d == dim else 1 for d in range(len(cut.shape_before))))
            masks[name] = masks[name] | wide if name in masks else wide.expand(cut.shape_before)
    return {name: mask for name, mask in masks.items() if mask.any()}
