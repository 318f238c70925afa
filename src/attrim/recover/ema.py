"""The moving average of a network's weights during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["moving_average"]


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` that follows it: ``w ← d·w + (1 - d)·w_model`` at each ``update_parameters(model)``.

    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` updates, so that the average of a short run does not hang on the
    weights it began with. Floating-point buffers (batch-norm statistics) are averaged too, counters are copied.

    Args:
        model: the network in training.
        decay: in (0, 1).

    Source:
        Polyak and Juditsky, 1992; the rising decay is that of TensorFlow's ``ExponentialMovingAverage``.

    Example:
        >>> average = moving_average(model, 0.999); average.update_parameters(model); average.module
    """

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            for old, new in zip(averaged, current, strict=True):
                old.copy_(new)
            return
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
