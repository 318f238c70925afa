"""lamp: magnitudes made comparable between groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attrim.core.channels import ChannelMap
from attrim.score.weights import l2

__all__ = ["lamp"]


def lamp(
    model: nn.Module,
    channels: ChannelMap,
    batches: Any = None,
    *,
    reduction: str = "sum",
    roles: Sequence[str] = ("out",),
) -> dict[str, Tensor]:
    """``‖w_c‖² / Σ_{v at or above c} ‖w_v‖²``, where the sum runs over the channels of the group that are no weaker.

    The strongest channel of every group gets 1. This function returns ``‖w_c‖²``; the quotient is the normalisation
    ``lamp``, which this criterion uses unless another one is asked for.

    Source: Lee et al., Layer-Adaptive Sparsity for the Magnitude-Based Pruning, ICLR 2021 (the LAMP score), for single
    weights. Putting a channel's squared norm, summed over the group's members, in place of a squared weight is our
    reading.
    """
    return l2(model, channels, batches, reduction=reduction, roles=roles, squared=True)
