"""Grouped convolutions and channel permutations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import conv_bn
from .pattern import pattern


@pattern("groupconv4", "conv1.weight:0", "grouped.weight:*", "head.weight:1")
class GroupConv4(nn.Module):
    """Four groups between dense convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.conv1(x)))))


@pattern("groupconv_uneven", "conv1.weight:0", "grouped.weight:*", "head.weight:1")
class GroupConvUneven(nn.Module):
    """Three groups with four inputs and six outputs each, with bias and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped, self.bn = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.BatchNorm2d(18)
        self.head = nn.Conv2d(18, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.grouped(F.relu(self.conv1(x))))))


@pattern("groupconv_res", "conv1.0.weight:0", "grouped.weight:*", "head.weight:1")
class GroupConvResidual(nn.Module):
    """A grouped convolution with its input added: the blocks of input and output are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.grouped = conv_bn(3, 16), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head(F.relu(x + self.grouped(x)))


@pattern("resnext_block", "stem.0.weight:0", "reduce.0.weight:0", "grouped.0.weight:*", "expand.0.weight:0")
class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3, 1x1 with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.reduce, self.grouped = conv_bn(12, 16, 1), conv_bn(16, 16, 3, stride=2, groups=4)
        self.expand = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.down = nn.Sequential(nn.Conv2d(12, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.expand(self.grouped(self.reduce(x))) + self.down(x))
        return self.fc(x.mean((2, 3)))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups."""
    b, c, h, w = x.size()
    x = x.view(b, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(b, -1, h, w)


@pattern("channel_shuffle", "conv1.weight:0", "grouped.weight:*", "head.weight:1")
class ChannelShuffle(nn.Module):
    """ShuffleNet: shuffle between a dense and a dense convolution, two groups, a literal group count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.grouped = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 1, bias=False)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = channel_shuffle(F.relu(self.conv1(x)), 2)
        return self.head(F.relu(self.grouped(x)))


@pattern("channel_shuffle_grouped", "conv1.weight:0", "g1.weight:*", "g2.weight:*", "head.weight:1")
class ChannelShuffleGrouped(nn.Module):
    """nn.ChannelShuffle between two grouped convolutions: each group of the second sees all of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.g1, self.g2 = nn.Conv2d(12, 24, 1, groups=3), nn.Conv2d(24, 12, 1, groups=3)
        self.shuffle, self.head = nn.ChannelShuffle(3), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(F.relu(self.g1(F.relu(self.conv1(x)))))
        return self.head(F.relu(self.g2(x)))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2 unit; stride 1 splits its input, stride 2 does not."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, cout // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False), nn.BatchNorm2d(cin), conv_bn(cin, half, 1)
            )
        self.branch2 = nn.Sequential(
            conv_bn(cin if stride > 1 else half, half, 1),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


@pattern("shufflev2", "units.0.branch2.0.0.weight:0", "units.1.branch2.3.0.weight:0", "head.0.weight:1")
class ShuffleNetV2(nn.Module):
    """A stage: one unit with stride 2, two that split, cat and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.units = nn.Sequential(ShuffleUnit(6, 24, 2), ShuffleUnit(24, 24, 1), ShuffleUnit(24, 24, 1))
        self.head, self.fc = conv_bn(24, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.units(self.stem(x))).mean([2, 3]))


@pattern("pixel_shuffle", "conv1.weight:0", "up.weight:0", "up.bias:0", "head.weight:1")
class PixelShuffle(nn.Module):
    """Sub-pixel convolution: four rows of ``up`` make one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.up = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6 * 4, 3, padding=1)
        self.shuffle, self.head = nn.PixelShuffle(2), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.shuffle(self.up(F.relu(self.conv1(x))))))


@pattern("pixel_unshuffle", "conv1.weight:0", "down.weight:1", "head.weight:1")
class PixelUnshuffle(nn.Module):
    """Space to depth: one channel becomes four, as in YOLO's focus layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(32, 10, 1)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.down(F.pixel_unshuffle(F.relu(self.conv1(x)), 2))))


@pattern("focus_slices", "conv1.weight:0", "down.weight:1")
class FocusSlices(nn.Module):
    """The focus layer written with strided slices of space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv1(x))
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.down(torch.cat(parts, 1))
