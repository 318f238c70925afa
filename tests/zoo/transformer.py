"""Transformer parts around and beyond plain attention: grouped queries, torch's own modules, windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import QKV, SCALE, Attention
from .pattern import image, pattern, tokens


@pattern(
    "gqa_repeat",
    "q_proj.weight:0",
    "k_proj.weight:0",
    "v_proj.weight:0",
    "o_proj.weight:1",
    inputs=tokens(2, 5, 6),
    inexact=SCALE,
    independent_oracle=False,
)
class GroupedQueryAttention(nn.Module):
    """Llama: four query heads share two key and value heads by repeat_interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 6
        self.embed, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.q_proj, self.o_proj = nn.Linear(12, 24, bias=False), nn.Linear(24, 12, bias=False)
        self.k_proj, self.v_proj = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        repeats = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.o_proj(y.transpose(1, 2).reshape(b, n, -1)))


@pattern(
    "gqa_expand",
    "q_proj.weight:0",
    "k_proj.weight:0",
    "v_proj.weight:0",
    "o_proj.weight:1",
    inputs=tokens(2, 5, 6),
    inexact=SCALE,
    independent_oracle=False,
    note="head_dim is the attribute, head counts come from -1, as in Hugging Face's Llama",
)
class GroupedQueryExpand(nn.Module):
    """The same with expand and reshape (Hugging Face's repeat_kv)."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups, self.scaling = 6, 2, 6**-0.5
        self.q_proj, self.o_proj = nn.Linear(6, 24, bias=False), nn.Linear(24, 4, bias=False)
        self.k_proj, self.v_proj = nn.Linear(6, 12, bias=False), nn.Linear(6, 12, bias=False)

    def _repeat(self, x: Tensor) -> Tensor:
        b, heads, n, width = x.shape
        x = x[:, :, None, :, :].expand(b, heads, self.num_key_value_groups, n, width)
        return x.reshape(b, heads * self.num_key_value_groups, n, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = self._repeat(k), self._repeat(v)
        weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * self.scaling, dim=-1)
        y = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.o_proj(y.reshape(*x.shape[:-1], -1))


@pattern(
    "mha_torch",
    "fc1.weight:0",
    "fc2.weight:1",
    inputs=tokens(2, 5, 12),
    expect="refused",
    must_refuse=("attn.in_proj_weight:*",),
    inexact=("layer norm",),
    note="torch checks embed_dim and splits in_proj_weight in three by it; the feed-forward part can be cut",
)
class TorchMultihead(nn.Module):
    """nn.MultiheadAttention in a pre-norm block with a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attn = nn.MultiheadAttention(12, 4, batch_first=True)
        self.fc1, self.fc2, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return self.head(x + self.fc2(F.relu(self.fc1(self.norm2(x)))))


@pattern(
    "torch_encoder_layer",
    "layer.linear1.weight:0",
    "layer.linear2.weight:1",
    inputs=tokens(2, 5, 12),
    inexact=("layer norm",),
)
class TorchEncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer; its fused inference kernel must not hide the feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


@pattern(
    "transformer_mlp_ln",
    "embed.weight:0",
    "norm.weight:0",
    "fc1.weight:0",
    "fc1.weight:1",
    "fc2.weight:0",
    inputs=tokens(2, 5, 6),
    inexact=("layer norm",),
)
class TransformerMLP(nn.Module):
    """A pre-norm MLP: the hidden width is exact, the residual width changes the layer norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.fc1, self.fc2, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))


@pattern(
    "swin_window",
    "patch.weight:0",
    "attn.v.weight:0",
    "attn.proj.weight:1",
    "head.weight:1",
    inputs=image(2, 3, 8, 8),
    inexact=SCALE,
    independent_oracle=False,
    producers=QKV,
)
class SwinWindow(nn.Module):
    """Shifted-window attention: roll, cut into windows, attend, put together, roll back."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.shift = 4, 2
        self.patch, self.attn, self.head = nn.Conv2d(3, 12, 1), Attention(12, 3, 4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        m = self.window
        y = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = y.view(b, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, m * m, c)
        y = self.attn(y).view(b, h // m, w // m, m, m, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, c)
        x = x + torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        return self.head(x.mean((1, 2)))
