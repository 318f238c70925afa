"""What a gate computes: squeeze and excitation, one-dimensional convolution, saliency from the input, softmax, CPSCA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KINDS", "Kind", "SpatialChannelGate", "make_gate"]

Kind = Literal["se", "sigmoid", "softmax", "eca", "fbs", "sca"]

OPEN = 3.0
"""Bias of a plain sigmoid gate at the beginning: it lets 95 % through."""


class Gate(nn.Module):
    """Maps what it sees of ``size`` channels to their logits and their attention.

    Attributes:
        sees: ``pool`` (means of the gated channels, ``(B, size)``), ``input`` (means of the layer's input channels,
            ``(B, inputs)``) or ``map`` (the channels themselves, ``(B, size, P)``).
    """

    sees: Literal["pool", "input", "map"] = "pool"

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention, each ``(B, size)``."""
        raise NotImplementedError


class SqueezeGate(Gate):
    """``W2 relu(W1 s + b1) + b2`` and an activation.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, with the second layer zero at the beginning, so that twice the
    sigmoid, or the scaled softmax, is exactly one; a plain sigmoid begins at its bias of 3, which is not the identity.

    Attributes:
        sharpness: factor of the logits under the softmax; may be raised while the gate learns.
    """

    sharpness: Tensor

    def __init__(self, size: int, hidden: int | None, act: Literal["double", "single", "softmax"]) -> None:
        super().__init__()
        self.first = nn.Linear(size, hidden or max(8, size // 16))
        self.second = nn.Linear(self.first.out_features, size)
        nn.init.zeros_(self.second.weight)
        nn.init.constant_(self.second.bias, OPEN if act == "single" else 0.0)
        self.act = act
        if act == "softmax":
            self.register_buffer("sharpness", torch.ones(()))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention, each ``(B, size)``."""
        logits = self.second(F.relu(self.first(seen)))
        if self.act == "softmax":
            return logits, logits.shape[1] * torch.softmax(self.sharpness.clone() * logits, 1)
        attention = torch.sigmoid(logits)
        return logits, attention if self.act == "single" else 2 * attention


class NeighbourGate(Gate):
    """A convolution along the channels without bias; Wang et al., "ECA-Net", CVPR 2020. Weights begin at zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        reach = int(abs(math.log2(size) / 2 + 0.5))
        width = reach if reach % 2 else reach + 1
        self.weight = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention, each ``(B, size)``."""
        logits = F.conv1d(seen[:, None], self.weight, padding=self.weight.shape[2] // 2)[:, 0]
        return logits, 2 * torch.sigmoid(logits)


class InputGate(Gate):
    """Saliency predicted from the layer's input: ``relu(W s + b)``; weight zero and bias one at the beginning.

    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019, without its winners-take-all.
    """

    sees = "input"

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.ones_(self.linear.bias)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention, each ``(B, size)``."""
        logits = self.linear(seen)
        return logits, F.relu(logits)


class SpatialChannelGate(Gate):
    """Spatial, then channel attention of CPSCA; not the identity at the beginning.

    Liu et al., "Channel pruning guided by spatial and channel attention for DNNs in intelligent edge computing", Applied
    Soft Computing 110, 2021 (arXiv 2011.03891). The spatial part divides the channels into 16 groups, the normalisation of
    the channel part into 4, or into the next smaller number that divides them.
    """

    sees = "map"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.groups, self.parts = _divisor(size, 16), _divisor(size, 4)
        self.spatial_weight = nn.Parameter(torch.zeros(self.groups))
        self.spatial_bias = nn.Parameter(torch.ones(self.groups))
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def spatial(self, maps: Tensor) -> Tensor:
        """``maps`` ``(B, size, P)`` with every position weighted, in groups of channels."""
        batch, size, positions = maps.shape
        grouped = maps.reshape(batch, self.groups, size // self.groups, positions)
        mask = grouped.amax(2) + grouped.mean(2)
        centred = mask - mask.mean(2, keepdim=True)
        if positions > 1:  # the unbiased deviation of one position is none
            centred = centred / (mask.std(2, keepdim=True) + 1e-5)
        level = self.spatial_weight[:, None] * centred + self.spatial_bias[:, None]
        return (grouped * torch.sigmoid(level)[:, :, None]).reshape(maps.shape)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention, each ``(B, size)``, of spatially weighted maps ``(B, size, P)``."""
        logits = self._level(seen.mean(2)) + self._level(seen.amax(2))
        return logits, torch.sigmoid(logits)

    def _level(self, pooled: Tensor) -> Tensor:
        if pooled.shape[1] == self.parts:  # one value a part is its own mean
            return torch.zeros_like(pooled) * self.weight + self.bias
        return F.group_norm(pooled, self.parts, self.weight, self.bias)


def _divisor(size: int, largest: int) -> int:
    return next(n for n in range(min(size, largest), 0, -1) if size % n == 0)


KINDS: Mapping[str, Callable[[int, int, int | None], Gate]] = MappingProxyType(
    {
        "se": lambda size, inputs, hidden: SqueezeGate(size, hidden, "double"),
        "sigmoid": lambda size, inputs, hidden: SqueezeGate(size, hidden, "single"),
        "softmax": lambda size, inputs, hidden: SqueezeGate(size, hidden, "softmax"),
        "eca": lambda size, inputs, hidden: NeighbourGate(size),
        "fbs": lambda size, inputs, hidden: InputGate(inputs, size),
        "sca": lambda size, inputs, hidden: SpatialChannelGate(size),
    }
)
"""Name -> function of the channels, the layer's input channels and the hidden width."""


def make_gate(kind: str, size: int, inputs: int, hidden: int | None) -> Gate:
    """A new gate of ``size`` channels behind a layer with ``inputs`` channels."""
    return KINDS[kind](size, inputs, hidden)
