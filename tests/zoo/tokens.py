"""Token layouts (batch, tokens, width): patch embedding, MLPs, gated MLPs, concatenation, windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import image, pattern, tokens


@pattern("tokens_flatten_transpose", "patch.weight:0", "fc1.weight:0", "fc2.weight:0", "head.weight:1")
class TokensFlattenTranspose(nn.Module):
    """Patch embedding by a convolution, flatten(2).transpose(1, 2), a position embedding and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.pos = nn.Conv2d(3, 12, 2, stride=2), nn.Parameter(torch.zeros(1, 16, 12))
        self.fc1, self.fc2, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.mean(dim=1))


@pattern("cls_token", "patch.weight:0", "cls:2", "pos:2", "fc1.weight:0", "head.weight:1")
class ClassToken(nn.Module):
    """A class token is expanded, put in front and read out by number."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 5, 12))
        self.mix, self.fc1, self.fc2 = nn.Linear(5, 5), nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.pos
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x[:, 0])


@pattern("mlp_mixer", "patch.weight:0", "tok1.weight:0", "ch1.weight:0", "head.weight:1", inexact=("layer norm",))
class MLPMixer(nn.Module):
    """One Mixer block: an MLP over tokens and an MLP over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 2, stride=2)
        self.n1, self.n2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.tok1, self.tok2, self.ch1, self.ch2 = (
            nn.Linear(a, b) for a, b in ((16, 10), (10, 16), (12, 24), (24, 12))
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tok2(F.gelu(self.tok1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.ch2(F.gelu(self.ch1(self.n2(x))))
        return self.head(x.mean(1))


@pattern("tok_cat_dimm1", "a.weight:0", "b.weight:0", "c.weight:1", inputs=tokens(2, 5, 6))
class TokenCatLast(nn.Module):
    """Features concatenated on dimension -1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 12), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], dim=-1))


@pattern("tok_cat_dim2", "a.weight:0", "b.weight:0", "c.weight:1", inputs=tokens(2, 5, 6))
class TokenCatTwo(TokenCatLast):
    """The same on dimension 2."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], dim=2))


@pattern("tok_cat_tokens", "a.weight:0", "b.weight:0", "c.weight:1", inputs=tokens(2, 5, 6))
class TokenCatTokens(nn.Module):
    """Tokens concatenated along the sequence: the widths are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([F.relu(self.a(x)), self.b(x[:, :2])], dim=1))


@pattern("tok_swiglu_chunk", "w12.weight:0", "w12.bias:0", "w3.weight:1", inputs=tokens(2, 5, 6))
class SwiGLUFused(nn.Module):
    """DINOv2's fused SwiGLU: one linear layer, chunk on dimension -1."""

    dim = -1

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.w12, self.w3 = nn.Linear(12, 2 * 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x1, x2 = self.w12(x).chunk(2, dim=self.dim)
        return self.head(x + self.w3(F.silu(x1) * x2))


@pattern("tok_swiglu_chunk2", "w12.weight:0", "w12.bias:0", "w3.weight:1", inputs=tokens(2, 5, 6))
class SwiGLUFusedTwo(SwiGLUFused):
    """The same with the dimension counted from the front."""

    dim = 2


@pattern("swiglu_separate", "w1.weight:0", "w2.weight:0", "w3.weight:1", inputs=tokens(2, 5, 6))
class SwiGLUSeparate(nn.Module):
    """Llama's MLP: gate and up are separate layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(6, 16, bias=False), nn.Linear(6, 16, bias=False)
        self.w3 = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


@pattern(
    "patch_merging",
    "embed.weight:0",
    "norm.weight:0",
    "reduction.weight:[01]",
    "head.weight:1",
    inputs=image(2, 4, 4, 6),
    inexact=("layer norm",),
)
class PatchMerging(nn.Module):
    """Swin: four neighbours are concatenated on the last axis, normed and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(32)
        self.reduction, self.head = nn.Linear(32, 12, bias=False), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm(x)).flatten(1, 2).mean(1))


@pattern(
    "spatial_gating_unit",
    "embed.weight:0",
    "up.weight:0",
    "down.weight:1",
    "head.weight:1",
    inputs=tokens(2, 5, 6),
    inexact=("layer norm",),
)
class GatedMLP(nn.Module):
    """gMLP: chunk, norm one half, mix its tokens, multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.norm = nn.Linear(6, 10), nn.Linear(10, 24), nn.LayerNorm(12)
        self.mix, self.down, self.head = nn.Conv1d(5, 5, 1), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        u, v = F.gelu(self.up(x)).chunk(2, dim=-1)
        return self.head(x + self.down(u * self.mix(self.norm(v))))
