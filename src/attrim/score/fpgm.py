"""fpgm: channels that others can stand in for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap, Member
from attrim.score.gather import by_members, check_finite, move_first, tensors_of
from attrim.score.weights import ANY_ROLE

__all__ = ["fpgm"]


def fpgm(
    model: nn.Module,
    channels: ChannelMap,
    batches: Any = None,
    *,
    reduction: str = "mean",
    roles: Sequence[str] = ("out",),
) -> dict[str, Tensor]:
    """``Σ_v ‖w_c − w_v‖₂`` over all channels ``v`` of the group, in each member, then the reduction over members.

    The channel with the smallest sum lies nearest the geometric median of all filters, so the others represent it best.

    Source: He et al., Filter Pruning via Geometric Median, CVPR 2019, for the filters of one layer;
    the reduction over the members of a tied group is our reading.

    Args:
        roles: as in :func:`attrim.score.weights.l1`.
        reduction: across members.
    """
    tensors = tensors_of(model, channels)

    def value(member: Member) -> Tensor:
        tensor = tensors[member.axis.tensor]
        index = torch.from_numpy(member.index).to(tensor.device)
        rows = move_first(tensor, member.axis.dim)[index].flatten(1)
        return check_finite(_distance_sums(rows.double()), member.axis.tensor).cpu()

    return by_members(channels, value, reduction, roles, ANY_ROLE)


def _distance_sums(rows: Tensor) -> Tensor:
    """Sum of each row's Euclidean distances to all rows; ``(size, elements)`` -> ``(size,)``.

    By one matrix product in double precision: a loop over pairs would need size² · elements memory or time.
    """
    squares = rows.square().sum(1)
    products = rows @ rows.T
    distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0)
    return distances.fill_diagonal_(0).sqrt().sum(1)
