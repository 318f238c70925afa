"""Attention with position information: rotary tables, relative biases, slopes per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import pattern, tokens


@pattern(
    "rotary_attention",
    "q.weight:0",
    "v.weight:0",
    "proj.weight:1",
    "fc.weight:0",
    inputs=tokens(2, 5, 6),
    inexact=("attention scale",),
    independent_oracle=False,
)
class RotaryAttention(nn.Module):
    """Rotary position embedding: head widths are tied to a table, whole heads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16)
        self.proj, self.fc, self.head = nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-b, a), dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)
        return self.head(F.gelu(self.fc(self.proj(y.transpose(1, 2).reshape(b, n, -1)))))


@pattern(
    "relative_position_bias",
    "qkv.weight:0",
    "table:1",
    "proj.weight:1",
    inputs=tokens(2, 4, 6),
    inexact=("attention scale",),
    independent_oracle=False,
)
class RelativePositionBias(nn.Module):
    """Swin: a table (positions x heads) is looked up by an index buffer and added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, 0.5
        self.qkv, self.proj = nn.Linear(6, 48), nn.Linear(16, 5)
        self.table = nn.Parameter(torch.zeros(7, 4))
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4)[None] + 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = ((q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


@pattern(
    "alibi_buffer",
    "qkv.weight:0",
    "proj.weight:1",
    inputs=tokens(2, 4, 6),
    inexact=("attention scale",),
    independent_oracle=False,
)
class AlibiBuffer(nn.Module):
    """A slope per head in a buffer, used in the attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj = nn.Linear(6, 48), nn.Linear(16, 5)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        distance = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs().to(x.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=-self.slopes * distance)
        return self.proj(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))
