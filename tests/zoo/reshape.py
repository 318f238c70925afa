"""Flattening, views and layout changes between convolutions and linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import image, pattern


@pattern("flatten_hw", "conv.weight:0", "fc1.weight:1", "fc1.weight:0", "fc2.weight:1")
class FlattenHW(nn.Module):
    """LeNet: flatten with space; one channel owns sixteen columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


@pattern("flatten_conv1d", "conv1.weight:0", "conv2.weight:0", "fc.weight:1", inputs=image(2, 4, 20))
class FlattenConv1d(nn.Module):
    """The same in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(4, 8, 5), nn.Conv1d(8, 6, 3, stride=2)
        self.fc = nn.Linear(6 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1))


@pattern("flatten_conv3d", "net.0.weight:0", "net.1.weight:0", "net.5.weight:1", inputs=image(2, 2, 4, 6, 6))
class FlattenConv3d(nn.Module):
    """The same in three dimensions, as one nn.Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(2, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Flatten(),
            nn.Linear(144, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pattern("permute_channels_last", "conv.weight:0", "pw1.weight:0", "pw2.weight:0", "head.weight:1")
class PermuteChannelsLast(nn.Module):
    """ConvNeXt's trick: linear layers on a channels-last copy, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dw = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.pw1, self.pw2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.dw(x).permute(0, 2, 3, 1)
        y = self.pw2(F.gelu(self.pw1(y)))
        return self.head(x + y.permute(0, 3, 1, 2))


@pattern("linear_view_conv", "project.weight:0", "project.bias:0", "conv.weight:1", inputs=image(2, 10))
class LinearViewConv(nn.Module):
    """A generator: a vector becomes a map; sixteen rows of the linear layer make one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(10, 12 * 4 * 4)
        self.conv, self.out = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.Conv2d(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.project(z).view(z.shape[0], -1, 4, 4)
        return self.out(F.relu(self.conv(F.relu(x))))


@pattern("view_attr_width", "project.weight:0", "conv.weight:*", inputs=image(2, 10))
class ViewAttrWidth(nn.Module):
    """The same with the width read from an attribute, which has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.base_channels, self.size = 12, 5
        self.project, self.bn = nn.Linear(10, 12 * 25), nn.BatchNorm2d(12)
        self.conv = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.project(z).view(-1, self.base_channels, self.size, self.size)
        return self.conv(F.relu(self.bn(x)))


@pattern("reshape_spatial", "conv.weight:0", "head.weight:1")
class ReshapeSpatial(nn.Module):
    """Space is cut into windows and put together again; channels ride along (b, c, nh, h, nw, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 16), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        b, c, h, w = x.shape
        windows = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 16)
        windows = self.mix(windows).reshape(b, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return self.head(windows.reshape(b, c, h, w))


@pattern("unfold_patches", "conv.weight:0", "fc.weight:1")
class UnfoldPatches(nn.Module):
    """F.unfold: one channel owns a block of k x k rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(F.relu(self.conv(x)), kernel_size=2, stride=2)
        return self.fc(patches.transpose(1, 2)).mean(1)
