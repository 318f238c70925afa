"""More operators for random networks: channels that are cut into pieces, moved, interleaved and read in unusual ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Thirds(nn.Module):
    """Three equal parts: the first gates the second, the third goes through a branch and is added."""

    def __init__(self, body: nn.Module, dim: int) -> None:
        super().__init__()
        self.body, self.dim = body, dim

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, self.dim)
        return a.sigmoid() * b + self.body(c)


class Rotate(nn.Module):
    """The second half of the channels before the first, by slices of half the width that the tensor has."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, half:], x[:, :half]], 1)


class Roll(nn.Module):
    """Channels shifted by a constant."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(self.shift, 1)


class Pick(nn.Module):
    """Channels in an order that a buffer holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(channels).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class Interleave(nn.Module):
    """Two branches of the same width, channel by channel in turn."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x), self.second(x)], 2).flatten(1, 2)


class Stack(nn.Module):
    """Branches stacked on a new axis and added with learned weights."""

    def __init__(self, *branches: nn.Module, learned: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.weights = nn.Parameter(torch.ones(len(branches))) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([branch(x) for branch in self.branches])
        if self.weights is None:
            return stacked.sum(0)
        return (stacked * self.weights.softmax(0).view(-1, *[1] * x.ndim)).sum(0)


class Fold(nn.Module):
    """The channels as ``blocks`` blocks, added up or reduced to the largest of each place; or places of each block."""

    def __init__(self, blocks: int, how: str, inner: bool) -> None:
        super().__init__()
        self.blocks, self.how, self.inner = blocks, how, inner

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.inner:
            folded = x.view(b, c // self.blocks, self.blocks, h, w)
        else:
            folded = x.view(b, self.blocks, c // self.blocks, h, w)
        dim = 2 if self.inner else 1
        return folded.sum(dim) if self.how == "sum" else folded.amax(dim)


class Broadcast(nn.Module):
    """A map of one channel added to all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).expand_as(x)


class Einsum(nn.Module):
    """A 1x1 convolution by ``einsum``, with a parameter of its own."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cout, cin))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,oc->bohw", x, self.weight)


class Tied(nn.Module):
    """Down and up again with one weight, transposed the second time."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.conv2d(x, self.weight).relu(), self.weight)


class Looks(nn.Module):
    """Attention written out: separate projections, matrix products, a softmax, a constant scale."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query = nn.Linear(channels, heads * width)
        self.key = nn.Linear(channels, heads * width)
        self.value = nn.Linear(channels, heads * width)
        self.out = nn.Linear(heads * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, self.width).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.width))


class Several(nn.Module):
    """Two outputs: class scores, and the mean of a projected map in a dictionary."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc, self.aside = nn.Linear(channels, 3), nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.fc(x.mean((2, 3))), {"aside": self.aside(x)}
