"""Slices, chunks and splits of the channel axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import conv_bn
from .pattern import pattern


@pattern("slice_channels", "stem.weight:0", "a.weight:1", "b.weight:1")
class SliceChannels(nn.Module):
    """The two halves of a tensor go separate ways; the bound is computed from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        half = x.size(1) // 2
        return self.a(x[:, :half]) + self.b(x[:, half:])


@pattern("slice_attr", "stem.weight:0", "a.weight:1", "b.weight:1")
class SliceAttr(nn.Module):
    """Partial convolution (FasterNet): the bound of an uneven slice is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dim_conv = nn.Conv2d(3, 16, 3, padding=1), 6
        self.a, self.b = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.a(x[:, : self.dim_conv]) + self.b(x[:, self.dim_conv :])


@pattern("slice_literal", "stem.weight:0", "b.weight:1", must_refuse=("a.weight:1",))
class SliceLiteral(nn.Module):
    """The bound is a literal: the six channels in front must stay where they are, the others can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.a(x[:, :6]) + self.b(x[:, 6:])


@pattern("chunk_glu", "conv.weight:0", "conv.bias:0", "head.weight:1")
class ChunkGLU(nn.Module):
    """Gated linear unit written by hand: halves are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return self.head(a * torch.sigmoid(b))


@pattern("functional_glu", "conv.weight:0", "conv.bias:0", "head.weight:1")
class FunctionalGLU(nn.Module):
    """The same as one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.conv(x), dim=1))


@pattern("chunk_two_convs", "stem.weight:0", "b.weight:1", "c.weight:1")
class ChunkTwoConvs(nn.Module):
    """Halves go through different convolutions: b(u) + c(v)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.b, self.c = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.chunk(F.relu(self.stem(x)), 2, dim=1)
        return self.b(u) + self.c(v)


@pattern("chunk_two_convs_rev", "stem.weight:0", "b.weight:1", "c.weight:1")
class ChunkTwoConvsReversed(ChunkTwoConvs):
    """The same sum written the other way round: c(v) + b(u)."""

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.chunk(F.relu(self.stem(x)), 2, dim=1)
        return self.c(v) + self.b(u)


class Bottleneck(nn.Module):
    """YOLO bottleneck with a shortcut."""

    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv_bn(c, hidden), conv_bn(hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


@pattern("chunk_csp_c2f", "cv1.0.weight:0", "m.0.cv1.0.weight:0", "m.1.cv2.0.weight:0", "cv2.0.weight:1")
class C2f(nn.Module):
    """YOLOv8 C2f: chunk, two bottlenecks in a row, everything concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.stem = conv_bn(3, 12)
        self.cv1, self.cv2 = conv_bn(12, 2 * self.c, 1), conv_bn(4 * self.c, 12, 1)
        self.m = nn.ModuleList(Bottleneck(self.c, 6) for _ in range(2))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(self.stem(x)).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.head(self.cv2(torch.cat(y, 1)))


@pattern("split_csp_c2f", "cv1.0.weight:0", "m.0.cv1.0.weight:0", "m.1.cv2.0.weight:0", "cv2.0.weight:1")
class C2fSplit(C2f):
    """The same module's other forward: split by the attribute ``c``, twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(self.stem(x)).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.head(self.cv2(torch.cat(y, 1)))


@pattern("split_attr", "stem.weight:0", "a.weight:1", "b.weight:1")
class SplitAttr(nn.Module):
    """Unequal split whose sizes are a list in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [6, 10]
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 5, 1), nn.Conv2d(10, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(F.relu(self.stem(x)), self.sizes, dim=1)
        return self.a(a) + self.b(b)


@pattern("split_attr_three", "stem.weight:0", "a.weight:0", "c.weight:1")
class SplitAttrThree(nn.Module):
    """Inception-next token mixer: two int attributes and a computed rest, put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.dim_id, self.dim_hw = 10, 4
        self.stem = nn.Conv2d(3, 18, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        self.c = nn.Conv2d(18, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        rest, w, h = torch.split(F.relu(self.stem(x)), (self.dim_id, self.dim_hw, self.dim_hw), dim=1)
        return self.c(torch.cat((rest, self.a(w), self.b(h)), dim=1))


@pattern("split_one_unused", "stem.weight:0", "head.weight:1")
class SplitOneUnused(nn.Module):
    """One half of a chunk is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        used, _ = F.relu(self.stem(x)).chunk(2, dim=1)
        return self.head(used)
