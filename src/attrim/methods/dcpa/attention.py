"""The attention part of the policy's logits: what the layers' own activations say about how wide they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CrossLayer", "Information", "Kind", "SqueezeExcite", "make_information"]

Kind = Literal["se", "xattn", "free", "random", "uniform"]

_SMALL = 0.01
"""Deviation of the weights that read attention out into logits."""


class Information(nn.Module):
    """Maps descriptors of the layers to additions to logits.

    Args:
        parts: the channels of each layer in flat vectors; an empty one has no descriptor and no addition.
        most: candidates of a layer; 0 to give one logit for each channel instead.
        balanced: divide what is added to a logit by the number of its inputs, so that a step of an optimiser like Adam
            moves a logit through them about as far as through a free parameter.
    """

    def __init__(self, parts: Sequence[slice], most: int, balanced: bool = False) -> None:
        super().__init__()
        self.balanced = balanced
        self.parts, self.most = tuple(parts), most
        self.channels = max((p.stop for p in parts), default=0)

    def weights(self, z: Tensor) -> Tensor:
        """Attention to look at, for a descriptor ``z`` of shape ``(channels,)``."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        """Additions of shape ``(layers, most)``, or ``(channels,)`` where ``most`` is 0."""
        raise NotImplementedError


class SqueezeExcite(Information):
    """``U · σ(A2 relu(A1 z))`` for each layer, from its own descriptor; layers of one size are computed together.

    ``most = 0``: ``u ⊙ σ(…)``, one number for each channel.

    Args:
        parts, most, balanced: see :class:`Information`.
        reduction: hidden units are ``max(C // reduction, 4)``.

    Source:
        Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018; that its output enters the logits is our reading of DCP-A.
    """

    def __init__(self, parts: Sequence[slice], most: int, reduction: int = 16, balanced: bool = False) -> None:
        super().__init__(parts, most, balanced)
        sizes = sorted({p.stop - p.start for p in parts} - {0})
        self._layers = [[i for i, p in enumerate(parts) if p.stop - p.start == size] for size in sizes]
        self.stacks = nn.ModuleList(
            _Stack(len(own), c, max(c // reduction, 4), most) for c, own in zip(sizes, self._layers, strict=True)
        )
        for number, (size, own) in enumerate(zip(sizes, self._layers, strict=True)):
            starts = torch.tensor([parts[i].start for i in own], dtype=torch.int64)
            self.register_buffer(f"index{number}", starts[:, None] + torch.arange(size), persistent=False)
            self.register_buffer(f"layers{number}", torch.tensor(own, dtype=torch.int64), persistent=False)

    def weights(self, z: Tensor) -> Tensor:
        """``σ(A2 relu(A1 z))``, shape ``(channels,)``."""
        result = z.new_zeros(self.channels)
        for number, stack in enumerate(self.stacks):
            index = self.get_buffer(f"index{number}")
            result = result.index_copy(0, index.reshape(-1), stack(z[index]).reshape(-1))
        return result

    def forward(self, z: Tensor) -> Tensor:
        """See :class:`Information`."""
        result = z.new_zeros((len(self.parts), self.most) if self.most else (self.channels,))
        for number, stack in enumerate(self.stacks):
            index = self.get_buffer(f"index{number}")
            attention, out = stack(z[index]), stack.get_parameter("out")
            if self.most:
                added = torch.einsum("nkc,nc->nk", out, attention) / (out.shape[2] if self.balanced else 1)
                result = result.index_copy(0, self.get_buffer(f"layers{number}"), added)
            else:
                result = result.index_copy(0, index.reshape(-1), (out * attention).reshape(-1))
        return result


class _Stack(nn.Module):
    """Two layers for each of ``n`` descriptors of ``c`` channels."""

    def __init__(self, n: int, c: int, hidden: int, most: int) -> None:
        super().__init__()
        squeeze = torch.empty(n, hidden, c).uniform_(-1, 1) / math.sqrt(c)
        squeeze[:, ::2].abs_()  # activations are mostly positive: half of the few hidden units are never dead at first
        self.squeeze = nn.Parameter(squeeze)
        self.squeeze_bias = nn.Parameter(torch.zeros(n, hidden))
        self.excite = nn.Parameter(torch.empty(n, c, hidden).uniform_(-1, 1) / math.sqrt(hidden))
        self.excite_bias = nn.Parameter(torch.empty(n, c).uniform_(-1, 1) / math.sqrt(hidden))
        self.out = nn.Parameter(_SMALL * torch.randn(n, most, c) if most else _SMALL * torch.randn(n, c))

    def forward(self, z: Tensor) -> Tensor:
        """``(n, c)`` to ``(n, c)``, in (0, 1)."""
        inner = torch.einsum("nhc,nc->nh", self.squeeze, z) + self.squeeze_bias
        return (torch.einsum("nch,nh->nc", self.excite, inner.relu()) + self.excite_bias).sigmoid()


class CrossLayer(Information):
    """One self-attention over the layers: each layer's logits may depend on all layers' descriptors.

    Tokens ``LN(P [mean z, std z, max z, log C, log MACs, place] + embedding)``, one head with a residual connection, and one
    read-out for all layers.

    Args:
        parts, most, balanced: see :class:`Information`.
        macs: shape ``(layers,)``; multiply-adds that depend on the layer's width.
        width: of the tokens.

    Source:
        Vaswani et al., 2017; its use here is our second reading of "layer information" in DCP-A.
    """

    def __init__(
        self, parts: Sequence[slice], most: int, macs: Tensor, width: int = 32, balanced: bool = False
    ) -> None:
        super().__init__(parts, most, balanced)
        count = len(parts)
        sizes = torch.tensor([p.stop - p.start for p in parts], dtype=torch.float64)
        fixed = torch.stack(
            [sizes.clamp(min=1).log(), macs.double().clamp(min=1).log(), torch.arange(count) / max(1, count)], 1
        )
        self.register_buffer("fixed", fixed.to(torch.get_default_dtype()), persistent=False)
        owner = torch.repeat_interleave(torch.arange(count), sizes.long())
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("sizes", sizes.to(torch.get_default_dtype()).clamp(min=1), persistent=False)
        self.project = nn.Linear(6, width)
        self.embedding = nn.Parameter(0.02 * torch.randn(count, width))
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Parameter(_SMALL * torch.randn(most or self.channels, width))

    def weights(self, z: Tensor) -> Tensor:
        """How much each layer looks at each other, shape ``(layers, layers)``, rows summing to 1."""
        tokens = self._tokens(z)
        scores: Tensor = self.query(tokens) @ self.key(tokens).T / math.sqrt(tokens.shape[1])
        return scores.softmax(1)

    def forward(self, z: Tensor) -> Tensor:
        """See :class:`Information`."""
        tokens = self._tokens(z)
        mixed = F.scaled_dot_product_attention(
            self.query(tokens)[None], self.key(tokens)[None], self.value(tokens)[None]
        )[0]
        found: Tensor = mixed + tokens
        logits: Tensor = found @ self.out.T if self.most else (self.out * found[self.get_buffer("owner")]).sum(1)
        return logits / tokens.shape[1] if self.balanced else logits

    def _tokens(self, z: Tensor) -> Tensor:
        owner, sizes, count = self.get_buffer("owner"), self.get_buffer("sizes"), len(self.parts)
        mean = z.new_zeros(count).index_add(0, owner, z) / sizes
        spread = (z.new_zeros(count).index_add(0, owner, (z - mean[owner]) ** 2) / sizes).sqrt()
        most = z.new_zeros(count).scatter_reduce(0, owner, z, "amax", include_self=False)
        features = torch.cat([torch.stack([mean, spread, most], 1), self.get_buffer("fixed")], 1)
        tokens: Tensor = self.norm(self.project(features) + self.embedding)
        return tokens


def make_information(
    kind: Kind, parts: Sequence[slice], most: int, macs: Tensor, reduction: int, balanced: bool
) -> Information | None:
    """The attention part, or None where the logits are free parameters alone."""
    if kind == "se":
        return SqueezeExcite(parts, most, reduction, balanced)
    return CrossLayer(parts, most, macs, balanced=balanced) if kind == "xattn" else None
