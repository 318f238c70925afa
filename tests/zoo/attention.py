"""Attention blocks: separate and fused projections, grouped queries, windows, torch's own module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import pattern, tokens

SCALE = ("attention scale",)
SCALE_AND_NORM = ("attention scale", "layer norm")


class Attention(nn.Module):
    """Separate q, k, v; head counts, widths and the scale are attributes."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, head_dim**-0.5
        inner = num_heads * head_dim
        self.q, self.k, self.v = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


QKV = tuple(f"*{layer}.{leaf}:0" for layer in "qk" for leaf in ("weight", "bias"))


@pattern(
    "attn_sep_qkv",
    "embed.weight:0",
    "attn.q.weight:0",
    "attn.v.weight:0",
    "attn.proj.weight:1",
    "head.weight:1",
    inputs=tokens(2, 5, 6),
    inexact=SCALE,
    producers=QKV,
)
class AttentionSeparate(nn.Module):
    """A residual attention block without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(6, 12), Attention(12, 4, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x))


@pattern(
    "attn_sep_qkv_no_hint",
    "query.weight:0",
    "value.weight:0",
    "proj.weight:1",
    inputs=tokens(2, 5, 12),
    inexact=SCALE,
    independent_oracle=False,
    producers=("query.*:0", "key.*:0"),
    note="nanoGPT style: widths come from the input's shape and the scale from the keys' shape",
)
class AttentionNoHint(nn.Module):
    """Causal attention that computes every size itself; only the head count is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.query, self.key, self.value = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16)
        self.proj = nn.Linear(16, 12)
        self.register_buffer("bias", torch.tril(torch.ones(5, 5, dtype=torch.bool)).view(1, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.size()
        q, k, v = (f(x).view(b, t, self.n_head, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(~self.bias[:, :, :t, :t], float("-inf")), dim=-1)
        return self.proj((att @ v).transpose(1, 2).contiguous().view(b, t, -1))


class FusedAttention(nn.Module):
    """timm's attention: fused qkv, scaled dot-product attention, sizes in attributes."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.attn_dim = num_heads * head_dim
        self.qkv, self.proj = nn.Linear(dim, 3 * self.attn_dim), nn.Linear(self.attn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


@pattern(
    "attn_fused_sdpa",
    "embed.weight:0",
    "attn.qkv.weight:0",
    "attn.proj.weight:1",
    "fc1.weight:0",
    inputs=tokens(2, 5, 6),
    inexact=SCALE_AND_NORM,
    independent_oracle=False,
)
class AttentionFused(nn.Module):
    """A pre-norm transformer block with fused qkv."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(6, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attn = FusedAttention(12, 4, 4)
        self.fc1, self.fc2, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


@pattern(
    "attn_fused_no_hint",
    "qkv.weight:0",
    "proj.weight:1",
    inputs=tokens(2, 5, 6),
    inexact=SCALE,
    independent_oracle=False,
    note="the result is reshaped to the input's width: heads and width go together",
)
class AttentionFusedNoHint(nn.Module):
    """The older ViT code: ``C // num_heads`` and a reshape to (B, N, C) with the C of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.embed, self.qkv, self.proj = nn.Linear(6, 16), nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.head(x + self.proj(y.transpose(1, 2).reshape(b, n, c)))


@pattern(
    "attn_fused_chunk", "qkv.weight:0", "proj.weight:1", inputs=tokens(2, 5, 6), inexact=SCALE, independent_oracle=False
)
class AttentionFusedChunk(nn.Module):
    """Fused qkv taken apart by chunk, then heads by a view with -1."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


@pattern(
    "cross_attention_einsum",
    "q.weight:0",
    "kv.weight:0",
    "proj.weight:1",
    inexact=SCALE,
    producers=("q.*:0",),
    independent_oracle=False,
    inputs=lambda g: (
        torch.randn(2, 5, 6, generator=g, dtype=torch.float64),
        torch.randn(2, 7, 10, generator=g, dtype=torch.float64),
    ),
)
class CrossAttentionEinsum(nn.Module):
    """Queries attend to a second input; contractions written as einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = 3, 4**-0.5
        self.q, self.kv, self.proj = nn.Linear(6, 12), nn.Linear(10, 24), nn.Linear(12, 4)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(self.scale).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
