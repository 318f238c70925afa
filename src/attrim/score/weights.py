"""Criteria that read the weights only: random, l1, l2, bn_scale. No data, milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap, Member
from attrim.errors import CriterionError
from attrim.score.gather import AxisSums, by_members, tensors_of

__all__ = ["ANY_ROLE", "bn_scale", "l1", "l2", "random"]

ANY_ROLE = ("out", "param", "in", "scale", "shift")
"""What stands in for the producers of a group that has none: all its members except buffers."""


def random(
    model: nn.Module, channels: ChannelMap, batches: Any = None, *, reduction: str = "mean", seed: int = 0
) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1): the control that every criterion has to beat.

    The numbers depend on ``seed`` and the sizes of the groups only; torch's global generator is neither read nor moved.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise CriterionError(f"seed: expected an int, found {seed!r}.")
    generator = torch.Generator().manual_seed(seed)
    return {group.id: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in channels}


def l1(
    model: nn.Module,
    channels: ChannelMap,
    batches: Any = None,
    *,
    reduction: str = "mean",
    roles: Sequence[str] = ("out",),
) -> dict[str, Tensor]:
    """``Σ |w|`` over a channel's weights in each member that plays one of ``roles``, then the reduction over members.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1, for one filter. Taking the mean
    over the producers of a tied group, and ``roles``, are our reading.

    Args:
        roles: ``("out",)`` are the filters; ``("out", "in", "scale")`` is the group norm of DepGraph (Fang et al., CVPR
            2023). A group in which no member plays any of the roles is valued by all its members.
        reduction: across members.
    """
    sums = AxisSums(tensors_of(model, channels), lambda tensor, dim: _power_sum(tensor, dim, 1))
    return by_members(channels, sums, reduction, roles, ANY_ROLE)


def l2(
    model: nn.Module,
    channels: ChannelMap,
    batches: Any = None,
    *,
    reduction: str = "mean",
    roles: Sequence[str] = ("out",),
    squared: bool = False,
) -> dict[str, Tensor]:
    """``sqrt(Σ w²)`` over a channel's weights in each member that plays one of ``roles``, then the reduction.

    Source: He et al., Soft Filter Pruning, IJCAI 2018 (the filter norm with p = 2); groups as in :func:`l1`.

    Args:
        roles: as in :func:`l1`.
        reduction: across members.
        squared: leave the root out: ``Σ w²``. With ``reduction="sum"`` this is the squared norm of the whole group.
    """
    sums = AxisSums(tensors_of(model, channels), lambda tensor, dim: _power_sum(tensor, dim, 2))

    def value(member: Member) -> Tensor:
        return sums(member) if squared else sums(member).sqrt()

    return by_members(channels, value, reduction, roles, ANY_ROLE)


def bn_scale(
    model: nn.Module, channels: ChannelMap, batches: Any = None, *, reduction: str = "mean"
) -> dict[str, Tensor]:
    """``|γ|`` of the norms that scale the group's channels, then the reduction over norms.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, section 3, where
    the network is first trained with an L1 penalty on γ. Any norm with a learnable scale counts (our reading). A group
    without one cannot be scored.
    """
    sums = AxisSums(tensors_of(model, channels), lambda tensor, dim: _power_sum(tensor, dim, 1))
    return by_members(channels, sums, reduction, ("scale",))


def _power_sum(tensor: Tensor, dim: int, power: int) -> Tensor:
    """``Σ |w|^power`` for each position of ``dim``, in one pass over the tensor."""
    real = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    if real.ndim == 1:
        return real.abs() if power == 1 else real.square()
    others = [d for d in range(real.ndim) if d != dim]
    norm: Tensor = torch.linalg.vector_norm(real, power, others)
    return norm if power == 1 else norm.square()
