"""The operators that random networks are made of: one small module each, sized by plain integers.

Images are (B, C, H, W), tokens (B, N, C).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "tanh": nn.Tanh, "softplus": nn.Softplus,
    "hardswish": nn.Hardswish, "leaky": nn.LeakyReLU, "elu": nn.ELU,
}  # fmt: skip


class Conv(nn.Conv2d):
    """Plain, grouped, depthwise or dilated; keeps the image size unless strided."""

    def __init__(self, cin: int, cout: int, kernel: int, groups: int, dilation: int, stride: int, bias: bool) -> None:
        super().__init__(cin, cout, kernel, stride, kernel // 2 * dilation, dilation, groups, bias)


class Up(nn.ConvTranspose2d):
    """Transposed convolution that doubles the image."""

    def __init__(self, cin: int, cout: int, groups: int, bias: bool) -> None:
        super().__init__(cin, cout, 2, 2, groups=groups, bias=bias)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class InPlace(nn.Module):
    """ReLU that writes over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x)


class Scale(nn.Module):
    """A learned factor and shift for each channel, used directly."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels, *[1] * dims))
        self.shift = nn.Parameter(torch.zeros(1, channels, *[1] * dims) if dims else torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class Residual(nn.Module):
    """``x + f(x)``, or a projection of x."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


class PadChannels(nn.Module):
    """Option-A shortcut: zeros for the channels that the input lacks."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class Concat(nn.Module):
    """Branches side by side; ``keep`` puts the input itself first, as in a dense block."""

    def __init__(self, *branches: nn.Module, keep: bool, dim: int) -> None:
        super().__init__()
        self.branches, self.keep, self.dim = nn.ModuleList(branches), keep, dim

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        return torch.cat([x, *parts] if self.keep else parts, self.dim)


class Chunk(nn.Module):
    """Halves through a branch each, then together again by concatenation (cross-stage partial) or by sum."""

    def __init__(self, first: nn.Module, second: nn.Module, join: str, dim: int) -> None:
        super().__init__()
        self.first, self.second, self.join, self.dim = first, second, join, dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, self.dim)
        a, b = self.first(a), self.second(b)
        return a + b if self.join == "sum" else torch.cat([b, a], self.dim)


class Split(nn.Module):
    """Unequal parts of constant size, one of them through a branch."""

    def __init__(self, body: nn.Module, sizes: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.body, self.sizes, self.dim = body, sizes, dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(self.sizes, self.dim)
        return torch.cat([a, self.body(b)], self.dim)


class Shuffle(nn.Module):
    """Channel shuffle; the width is read from the tensor."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Squeeze(nn.Module):
    """Squeeze-and-excitation gate."""

    def __init__(self, channels: int, hidden: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.down: nn.Module = nn.Linear(channels, hidden) if linear else nn.Conv2d(channels, hidden, 1)
        self.up: nn.Module = nn.Linear(hidden, channels) if linear else nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=not self.linear)
        gate = self.up(self.down(mean).relu()).sigmoid()
        return x * (gate[:, :, None, None] if self.linear else gate)


class SpatialGate(nn.Module):
    """One gate for each pixel, by a convolution (exact) or from the mean and maximum over channels (not exact)."""

    def __init__(self, channels: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.conv = nn.Conv2d(2 if pooled else channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1) if self.pooled else x
        return x * self.conv(seen).sigmoid()


class Gate(nn.Module):
    """Gated linear unit: one half times an activation of the other."""

    def __init__(self, dim: int, functional: bool) -> None:
        super().__init__()
        self.dim, self.functional = dim, functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            return F.glu(x, self.dim)
        a, b = x.chunk(2, self.dim)
        return F.silu(a) * b


class Twice(nn.Module):
    """One module used two times."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x).tanh())


class Resize(nn.Module):
    """Half or double the image: mean, maximum, nearest."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "nearest":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.how == "mean" else F.max_pool2d(x, 2)


class Tokens(nn.Module):
    """An image as a sequence: (B, C, H, W) -> (B, H W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class MixTokens(nn.Module):
    """A linear layer over the positions of a sequence."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.mix = nn.Linear(positions, positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with a fused projection; the head width is read from the tensor."""

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * heads * width)
        self.out = nn.Linear(heads * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Head(nn.Module):
    """From the last value to three class scores: through means, or flattened into the linear layer."""

    def __init__(self, channels: int, positions: int, tokens: bool, flat: bool) -> None:
        super().__init__()
        self.tokens, self.flat = tokens, flat
        self.fc = nn.Linear(channels * positions if flat else channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return self.fc(x.flatten(1))
        return self.fc(x.mean(1) if self.tokens else F.adaptive_avg_pool2d(x, 1).flatten(1))


class Chain(nn.Sequential):
    """One step after the other."""
