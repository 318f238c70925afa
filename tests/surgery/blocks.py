"""Residual blocks in the styles in which people write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["STYLES", "Net", "Style"]

Style = type[nn.Module]


class Shortcut(nn.Module):
    """x itself, a projection, a pooled projection, or option A (strided, padded with zero channels)."""

    def __init__(self, kind: str, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.kind, self.stride, self.more = kind, stride, cout - cin
        self.project = nn.Conv2d(cin, cout, 1, 1 if kind == "pool" else stride) if kind in ("project", "pool") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pad":
            return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        if self.project is None:
            return x
        return self.project(F.avg_pool2d(x, self.stride, ceil_mode=True) if self.kind == "pool" else x)


class Post(nn.Module):
    """conv, norm, ReLU, conv, norm, sum in place, one shared ReLU in place."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class Pre(nn.Module):
    """Pre-activation, the ReLU shared and in place: nothing of it may reach the shortcut."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1)
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        return self.conv2(self.relu(self.bn2(y))) + self.shortcut(x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with squeeze and excitation, and functional activations."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, stride, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.squeeze, self.excite = nn.Conv2d(cout, 4, 1), nn.Conv2d(4, cout, 1)
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return F.relu(self.shortcut(x) + y)


class Inverted(nn.Module):
    """Expand, depthwise, project; no activation behind the sum."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(cin, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 12, 3, stride, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, cout, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv(x)


class Scaled(nn.Module):
    """ConvNeXt: depthwise, channels last, two linear layers, layer scale and drop path."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.depth = nn.Conv2d(cin, cin, 5, stride, 2, groups=cin)
        self.norm = nn.LayerNorm(cin)
        self.up, self.down = nn.Linear(cin, 10), nn.Linear(10, cout)
        self.gamma = nn.Parameter(torch.rand(cout))
        self.drop = nn.Dropout(0.1)
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.shortcut(x) + self.drop(y.permute(0, 3, 1, 2))


class TwoBranches(nn.Module):
    """Two sums in one block, as in a transformer, with attention over positions written out in the block."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.query, self.value, self.out = nn.Conv2d(cin, 6, 1), nn.Conv2d(cin, 6, 1), nn.Conv2d(6, cout, 1)
        self.mlp = nn.Sequential(nn.Conv2d(cout, 8, 1), nn.GELU(), nn.Conv2d(8, cout, 1))
        self.resize = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, v = self.query(y).flatten(2), self.value(y).flatten(2)
        y = ((q @ q.transpose(1, 2)).softmax(-1) @ v).view(len(x), -1, *x.shape[2:])
        x = self.shortcut(x) + self.resize(self.out(y))
        return x + self.mlp(self.norm2(x))


class Subtracted(nn.Module):
    """x - f(x), as denoisers do, scaled by a number."""

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1), nn.Tanh(), nn.Conv2d(cout, cout, 3, 1, 1))
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.shortcut(x), self.body(x), alpha=0.5)


class ByKeyword(nn.Module):
    """The branch is a module called by keyword that returns a tuple."""

    class Inner(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(cin, cout, 3, stride, 1)

        def forward(self, *, hidden: Tensor, scale: float = 1.0) -> tuple[Any, ...]:
            return None, self.conv(hidden) * scale

    def __init__(self, cin: int, cout: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.inner = self.Inner(cin, cout, stride)
        self.drop = nn.Dropout(0.1)
        self.shortcut = Shortcut(shortcut, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.drop(self.inner(hidden=x)[1])


STYLES: dict[str, Style] = {
    kind.__name__: kind for kind in (Post, Pre, Bottleneck, Inverted, Scaled, TwoBranches, Subtracted, ByKeyword)
}


class Net(nn.Module):
    """Stem with a ReLU, the blocks, a head; blocks are (style, width, stride, shortcut)."""

    def __init__(self, *blocks: tuple[str, int, int, str], width: int = 8) -> None:
        super().__init__()
        self.stem, layers = nn.Conv2d(3, width, 3, padding=1), []
        for style, cout, stride, shortcut in blocks:
            layers.append(STYLES[style](width, cout, stride, shortcut))
            width = cout
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.stem(x))).mean((2, 3)))
