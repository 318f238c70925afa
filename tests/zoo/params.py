"""Parameters and buffers used directly, functional layers, contractions written by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import pattern, tokens, words


@pattern("layerscale_param", "stem.weight:0", "gamma:1", "conv2.weight:0", "head.weight:1")
class LayerScaleParam(nn.Module):
    """Layer scale of shape (1, C, 1, 1) in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 1), nn.Conv2d(20, 12, 1)
        self.gamma, self.head = nn.Parameter(1e-6 * torch.ones(1, 12, 1, 1)), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.gamma * self.conv2(F.gelu(self.conv1(x))))


@pattern("layerscale_flat", "embed.weight:0", "gamma:0", "fc1.weight:0", "head.weight:1", inputs=tokens(2, 5, 6))
class LayerScaleFlat(nn.Module):
    """Layer scale of shape (C,) on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.gamma, self.head = nn.Parameter(1e-5 * torch.ones(12)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(x))).mul(self.gamma))


@pattern("spatial_param", "conv.weight:0", "head.weight:1")
class SpatialParam(nn.Module):
    """An H x W parameter next to as many channels as it has rows: it is not a channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.weight_map, self.bias_map = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.zeros(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x) * self.weight_map + self.bias_map))


@pattern("buffer_chan", "conv.weight:0", "mean:1", "std:0", "head.weight:1")
class BufferPerChannel(nn.Module):
    """Registered buffers hold a value per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1)
        self.register_buffer("mean", torch.zeros(1, 12, 1, 1))
        self.register_buffer("std", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu((self.conv(x) - self.mean) * self.std[None, :, None, None]))


@pattern(
    "buffer_permutation",
    "stem.weight:0",
    "last.weight:1",
    must_refuse=("conv.weight:0",),
    note="a buffer of channel numbers reorders the channels of conv; they stay until it can be renumbered",
)
class BufferPermutation(nn.Module):
    """Channels are reordered by an index buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), nn.Conv2d(10, 6, 1)
        self.last = nn.Conv2d(6, 4, 1)
        self.register_buffer("order", torch.randperm(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.head(F.relu(self.conv(F.relu(self.stem(x))))[:, self.order])))


@pattern("functional_conv", "w1:0", "b1:0", "w2:0", "w2:1", "head.weight:1", consumers=("w2:1",))
class FunctionalConv(nn.Module):
    """Convolutions as functions of bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(10, 3, 3, 3) / 5), nn.Parameter(torch.randn(10))
        self.w2, self.head = nn.Parameter(torch.randn(8, 10, 1, 1) / 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.w1, self.b1, padding=1))
        return self.head(F.relu(F.conv2d(x, self.w2)).mean((2, 3)))


@pattern("einsum_mix", "stem.weight:0", "mix:0", "mix:1", "head.weight:1", consumers=("mix:0",))
class EinsumMix(nn.Module):
    """Channels mixed by an einsum with a bare parameter (input x output)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(12, 5, 1)
        self.mix = nn.Parameter(torch.randn(8, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bchw,cd->bdhw", F.relu(self.stem(x)), self.mix)
        return self.head(F.relu(x))


@pattern("matmul_param", "fc.weight:0", "w:0", "w:1", "out:0", inputs=tokens(2, 5, 6), consumers=("w:0", "out:0"))
class MatmulParam(nn.Module):
    """GPT-2's Conv1D: x @ w + b with the weight stored input x output, through addmm on flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.w, self.b = nn.Parameter(torch.randn(10, 16) / 3), nn.Parameter(torch.zeros(16))
        self.out = nn.Parameter(torch.randn(16, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(x))
        shape = (*x.size()[:-1], self.w.shape[1])
        x = torch.addmm(self.b, x.view(-1, x.size(-1)), self.w).view(shape)
        return F.gelu(x) @ self.out


@pattern(
    "bilinear_matmul",
    "theta.weight:0",
    "phi.weight:0",
    "g.weight:0",
    "out.weight:1",
    producers=("theta.weight:0", "theta.bias:0", "phi.weight:0", "phi.bias:0"),
)
class NonLocal(nn.Module):
    """Non-local block: softmax(theta . phi) . g, then a projection with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1)
        self.theta, self.phi, self.g = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 1), nn.Conv2d(12, 8, 1)
        self.out = nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, _, h, w = x.shape
        theta = self.theta(x).flatten(2).transpose(1, 2)
        phi, g = F.max_pool2d(self.phi(x), 2).flatten(2), F.max_pool2d(self.g(x), 2).flatten(2)
        attention = torch.matmul(theta, phi).softmax(dim=-1)
        y = torch.matmul(attention, g.transpose(1, 2)).transpose(1, 2).reshape(b, -1, h, w)
        return self.head(x + self.out(y))


@pattern("embedding", "embed.weight:1", "fc.weight:1", "fc.weight:0", inputs=words(20, 2, 7))
class EmbeddingMean(nn.Module):
    """Words looked up, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.out = nn.Embedding(20, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(self.embed(ids).mean(1))))


@pattern("tied_embedding", "embed.weight:1", "fc1.weight:0", "fc2.weight:0", inputs=words(20, 2, 7))
class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding; the tie must survive."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.lm_head = nn.Linear(12, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.fc2(F.gelu(self.fc1(x))))


@pattern(
    "embedding_scaled",
    "fc.weight:0",
    inputs=words(20, 2, 7),
    inexact=("scale", "number"),
    independent_oracle=False,
    note="sqrt(width) is computed in Python: embed stays, or its cut is called inexact",
)
class EmbeddingScaled(nn.Module):
    """The original Transformer multiplies by the square root of the width, read from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.out = nn.Embedding(20, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(torch.tanh(self.fc(x * math.sqrt(x.shape[-1]))))
