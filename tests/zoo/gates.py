"""Attention gates over channels and space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import pattern


@pattern("se_block", "conv.weight:0", "reduce.weight:0", "expand.weight:0", "head.weight:1")
class SEBlock(nn.Module):
    """Squeeze and excitation with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.reduce, self.expand = nn.Linear(16, 6), nn.Linear(6, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        b, c, _, _ = x.size()
        gate = F.adaptive_avg_pool2d(x, 1).view(b, c)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(gate)))).view(b, c, 1, 1)
        return self.head(x * gate.expand_as(x))


@pattern("se_conv", "conv.weight:0", "fc1.weight:0", "fc2.weight:0", "head.weight:1")
class SEConv(nn.Module):
    """The same with 1x1 convolutions and a hard sigmoid (MobileNetV3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return self.head(scale * x)


@pattern(
    "eca_gate",
    "conv.weight:0",
    must_refuse=("body.weight:0", "head.weight:1"),
    note="a convolution slides along the channels, so their neighbourhood matters; the layer before can be cut",
)
class ECAGate(nn.Module):
    """Efficient channel attention: a one-dimensional convolution along the channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body, self.gate = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 12, 3), nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.conv(x)))
        y = self.gate(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return self.head(x * torch.sigmoid(y))


@pattern("spatial_gate_1ch", "conv.weight:0", "gate.weight:1", "head.weight:1")
class SpatialGate(nn.Module):
    """A one-channel map multiplies all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 1, 7, padding=3)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(x * torch.sigmoid(self.gate(x)))


@pattern("broadcast_add_1ch", "a.weight:0", "hidden.weight:0", "head.weight:1")
class BroadcastAdd(nn.Module):
    """A one-channel map is added to all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.one, self.head = nn.Conv2d(6, 1, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x) + self.one(F.relu(self.hidden(x)))))


class SpatialAttention(nn.Module):
    """CBAM's spatial gate: mean and maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.mean(x, dim=1, keepdim=True)
        top, _ = torch.max(x, dim=1, keepdim=True)
        return torch.sigmoid(self.conv(torch.cat([mean, top], dim=1)))


@pattern("chan_mean_attn", "conv.weight:0", "head.weight:1", inexact=("over channels",), independent_oracle=False)
class ChannelMeanAttention(nn.Module):
    """A block gated by CBAM's spatial attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 12, 3, padding=1), SpatialAttention(), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(self.gate(x) * x)


@pattern(
    "cbam",
    "conv.weight:0",
    "mlp.0.weight:0",
    "mlp.2.weight:0",
    "head.weight:1",
    inexact=("over channels",),
    independent_oracle=False,
)
class CBAM(nn.Module):
    """CBAM whole: a shared MLP on mean and maximum over space, then the spatial gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.mlp = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
        self.spatial, self.head = SpatialAttention(), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        pooled = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * torch.sigmoid(pooled)
        return self.head(x * self.spatial(x))


@pattern("sk_branches", "a.weight:0", "b.weight:0", "squeeze.weight:0", "fcs.0.weight:0", "head.weight:1")
class SelectiveKernel(nn.Module):
    """Selective kernels: branches are weighted by a softmax over the branches, per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 3, padding=2, dilation=2)
        self.squeeze, self.fcs = nn.Linear(12, 6), nn.ModuleList(nn.Linear(6, 12) for _ in range(2))
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], dim=1)
        z = F.relu(self.squeeze(branches.sum(1).mean((-2, -1))))
        weights = torch.stack([fc(z) for fc in self.fcs], dim=1).softmax(dim=1)
        return self.head((branches * weights[..., None, None]).sum(1))


@pattern(
    "film_conditioning",
    "conv.weight:0",
    "film.weight:0",
    "embed.weight:0",
    "head.weight:1",
    inputs=lambda g: {
        "x": torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64),
        "condition": torch.randn(2, 6, generator=g, dtype=torch.float64),
    },
)
class FiLM(nn.Module):
    """Scale and shift from a second input, chunked from one linear layer; keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10, affine=False)
        self.embed, self.film = nn.Linear(6, 8), nn.Linear(8, 20)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(F.silu(self.embed(condition)))[:, :, None, None].chunk(2, dim=1)
        return self.head(F.silu(self.bn(self.conv(x)) * (1 + scale) + shift))
