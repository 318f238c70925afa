"""Small networks that several rooms of tests share, and the two things every test does with them: fill and cut."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from attrim import ChannelMap, PruningPlan, Scores

__all__ = ["Attention", "Inverted", "Mobile", "Plain", "Residual", "filled", "image", "kept_at_random", "random_scores"]


class Plain(nn.Module):
    """3 -> 8 -> 12 channels, then five classes. Groups: ``conv1`` (8) and ``conv2`` (12)."""

    def __init__(self, first: int = 8, second: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(second)
        self.head = nn.Linear(second, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions and a shortcut that projects where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.down(x)).relu()


class Residual(nn.Module):
    """A small residual network of stages, as ResNet-18 is built."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        cin, layers = widths[0], []
        for stage, width in enumerate(widths):
            for k in range(blocks):
                layers.append(Block(cin, width, 2 if stage and not k else 1))
                cin = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


class Inverted(nn.Module):
    """Expand, depthwise, project, as MobileNetV2 does; with a shortcut where the shapes agree."""

    def __init__(self, cin: int, cout: int, stride: int, factor: int = 4) -> None:
        super().__init__()
        wide = cin * factor
        self.expand = nn.Sequential(nn.Conv2d(cin, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, cout, 1, bias=False), nn.BatchNorm2d(cout))
        self.shortcut = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depth(self.expand(x)))
        return x + y if self.shortcut else y


class Mobile(nn.Module):
    """A small MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.body = nn.Sequential(
            Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 40, 2), Inverted(40, 40, 1)
        )
        self.last = nn.Sequential(nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6())
        self.fc = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.body(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Tokens (B, N, 12) -> fused q, k, v of 4 heads -> scaled dot-product attention -> five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.embed = nn.Linear(12, 20)
        self.qkv = nn.Linear(20, 3 * 24)
        self.proj = nn.Linear(24, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + self.proj(attended)).mean(1))


def image(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal noise of a fixed seed."""
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with random weights, affine parameters and statistics, all of one seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 4
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise / fan**0.5)
    return model.eval()


def random_scores(channels: ChannelMap, seed: int = 0) -> Scores:
    """Uniform scores for every group."""
    generator = torch.Generator().manual_seed(seed)
    return Scores({g.id: torch.rand(g.size, generator=generator) for g in channels}, "random")


def kept_at_random(channels: ChannelMap, seed: int = 0, least: int = 1) -> PruningPlan:
    """A plan that keeps a random, non-empty part of every group; the counts differ from group to group."""
    rng = np.random.default_rng(seed)
    kept = {g.id: rng.permutation(g.size)[: rng.integers(min(least, g.size - 1), g.size)] for g in channels}
    return attrim.plan_from_kept(channels, kept)
