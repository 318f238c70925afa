"""The networks that are measured: CIFAR ResNets of any depth (own definition), and torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

__all__ = ["CHAINS", "DENSE", "NETWORKS", "Case", "CifarResNet"]


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a projected shortcut where the width or size changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """He et al., CVPR 2016, section 4.2, of depth ``6 n + 2``, with projections (option B)."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth: expected 6 n + 2 (20, 32, 56, 110, …), found {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, cin = [], 16
        for width in (16, 32, 64):
            for index in range((depth - 2) // 6):
                blocks.append(Block(cin, width, 2 if index == 0 and width > 16 else 1))
                cin = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@dataclass(frozen=True)
class Case:
    """A network to measure.

    Attributes:
        build: makes it, random weights.
        side: of the square RGB image that it takes, batch 1.
        depth: what growth is measured against.
        classifier: path of the layer that the peer is told to leave alone.
    """

    build: Callable[[], nn.Module]
    side: int
    depth: int
    classifier: str

    def make(self) -> tuple[nn.Module, Tensor]:
        """The network with seeded weights in eval mode, and an input."""
        torch.manual_seed(0)
        return self.build().eval(), torch.randn(1, 3, self.side, self.side)


def _cifar(depth: int) -> Case:
    return Case(lambda: CifarResNet(depth), 32, depth, "fc")


def _dense(blocks: tuple[int, int, int, int], width: int = 64) -> Case:
    def build() -> nn.Module:
        return torchvision.models.DenseNet(growth_rate=32, block_config=blocks, num_init_features=width)

    return Case(build, 224, 2 * sum(blocks) + 5, "classifier")


CHAINS = {f"ResNet-{depth} CIFAR": _cifar(depth) for depth in (20, 56, 110, 218)}
"""The same blocks, more of them."""

DENSE = {
    "DenseNet-63": _dense((3, 6, 12, 8)),
    "DenseNet-121": _dense((6, 12, 24, 16)),
    "DenseNet-169": _dense((6, 12, 32, 32)),
    "DenseNet-201": _dense((6, 12, 48, 32)),
}
"""Growth rate 32; every layer reads all earlier ones of its block."""

NETWORKS = {
    "ResNet-50": Case(lambda: torchvision.models.resnet50(weights=None), 224, 50, "fc"),
    "DenseNet-121": DENSE["DenseNet-121"],
    "MobileNetV2": Case(lambda: torchvision.models.mobilenet_v2(weights=None), 224, 53, "classifier.1"),
    "ResNet-56 CIFAR": CHAINS["ResNet-56 CIFAR"],
}
"""The side-by-side table."""
