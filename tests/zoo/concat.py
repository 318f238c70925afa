"""Concatenation: dense, nested, repeated, with residuals, and partly used."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import conv_bn
from .pattern import pattern


@pattern("concat2", "a.weight:0", "b.weight:0", "c.weight:1")
class Concat2(nn.Module):
    """Two branches of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.c = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(torch.cat([self.a(x), self.b(x)], dim=1)))


class DenseLayer(nn.Module):
    """DenseNet layer: norm, ReLU, 1x1, norm, ReLU, 3x3."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


@pattern("dense_cascade", "stem.weight:0", "layers.0.conv2.weight:0", "layers.2.norm1.weight:0", "norm.running_mean:0")
class DenseCascade(nn.Module):
    """A dense block with three layers and its closing norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(3))
        self.norm, self.fc = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


@pattern("cat_same_twice", "a.weight:0", "b.weight:1")
class CatSameTwice(nn.Module):
    """One tensor concatenated with itself, and with its negative (CReLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(F.relu(torch.cat([x, x, -x], 1)))


@pattern("cat_then_residual", "a.weight:0", "b.weight:0", "c.weight:0", "d.weight:1")
class CatThenResidual(nn.Module):
    """A concatenation is added to one wide tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 3, padding=1)
        self.c, self.d = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


@pattern("add_conv_of_cat_and_part", "a.weight:0", "b.weight:0", "fuse.weight:0", "fuse.weight:1", "head.weight:1")
class AddConvOfCatAndPart(nn.Module):
    """A convolution of a concatenation is added to one part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.fuse, self.head = nn.Conv2d(18, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.head(F.relu(self.fuse(torch.cat([b, a], 1)) + a))


@pattern("inception4", "b1.0.weight:0", "b3.1.0.weight:0", "b5.0.0.weight:0", "pool.1.0.weight:0", "head.weight:1")
class Inception4(nn.Module):
    """Four branches, one of them through a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.b1 = conv_bn(12, 6, 1)
        self.b3 = nn.Sequential(conv_bn(12, 8, 1), conv_bn(8, 12))
        self.b5 = nn.Sequential(conv_bn(12, 4, 1), conv_bn(4, 6, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(12, 8, 1))
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.b1(x), self.b3(x), self.b5(x), self.pool(x)], 1))


@pattern("cat_of_cats", "a.weight:0", "b.weight:0", "c.weight:0", "mid.weight:0", "head.weight:1")
class CatOfCats(nn.Module):
    """A concatenation inside a concatenation, with a batch norm over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.mid = nn.Conv2d(14, 10, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(28), nn.Conv2d(28, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.cat([self.a(x), self.b(x)], 1)
        outer = torch.cat([self.c(x), torch.cat([self.mid(inner), inner], 1)], 1)
        return self.head(F.relu(self.bn(outer)))


@pattern("cat_then_flatten", "a.weight:0", "b.weight:0", "fc.weight:1")
class CatThenFlatten(nn.Module):
    """Concatenate, pool, flatten with space."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(14 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.cat([self.a(x), self.b(x)], 1), 2)
        return self.fc(torch.flatten(x, 1))


@pattern("flatten_then_cat", "a.weight:0", "b.weight:0", "fc.weight:1")
class FlattenThenCat(nn.Module):
    """Two flattened maps of different size are concatenated as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(3, 10, 3, padding=1)
        self.fc = nn.Linear(6 * 16 + 10 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x)).flatten(1)
        b = F.adaptive_avg_pool2d(F.relu(self.b(x)), 2).flatten(1)
        return self.fc(torch.cat((a, b), dim=-1))


@pattern("stack_sum", "a.weight:0", "b.weight:0", "c.weight:0", "head.weight:1")
class StackSum(nn.Module):
    """torch.stack followed by a sum over the new axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 5, padding=2)
        self.head = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([F.relu(f(x)) for f in (self.a, self.b, self.c)]).sum(0))


@pattern("stack_weighted_param", "a.weight:0", "b.weight:0", "c.weight:0", "head.weight:1")
class StackWeighted(nn.Module):
    """BiFPN fast normalised fusion: stack on a last axis, weighted by a small parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 1), nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.edge_weights = nn.Parameter(torch.ones(3))
        self.head = nn.Conv2d(10, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        nodes = [self.a(x), self.b(x), F.interpolate(F.max_pool2d(self.c(x), 2), scale_factor=2, mode="nearest")]
        weights = F.relu(self.edge_weights)
        weights = weights / (weights.sum() + 1e-4)
        return self.head(F.silu((torch.stack(nodes, dim=-1) * weights).sum(dim=-1)))
