"""MACs and parameters against PyTorch's own flop counter and true counts, before and after random cuts, to the last unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import attrim
from nets import Attention, Mobile, Plain, Residual, filled, image, kept_at_random


class Convolutions(nn.Module):
    """Grouped, depthwise with a multiplier, strided, dilated; transposed plain, grouped and depthwise; 1-d and 3-d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depth = nn.Conv2d(12, 24, 3, groups=12, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(24, 10, 4, 2, 1)
        self.up_grouped = nn.ConvTranspose2d(10, 6, 2, 2, groups=2)
        self.up_depth = nn.ConvTranspose2d(6, 6, 3, groups=6)
        self.cube = nn.Conv3d(1, 5, 3)
        self.line = nn.Conv1d(5, 7, 3, padding=2, dilation=2)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.grouped, self.depth, self.up, self.up_grouped, self.up_depth):
            x = layer(x).relu()
        return self.head(self.line(self.cube(x.unsqueeze(1)).flatten(2)).mean(-1))


class Products(nn.Module):
    """bmm, einsum, matmul with a parameter, a product with an expanded matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(6, 14)
        self.out, self.table = nn.Linear(14, 9, bias=False), nn.Parameter(torch.ones(9, 5))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.bmm(self.query(x), self.key(x).transpose(1, 2)).sigmoid()
        return self.out(torch.einsum("bij,bjd->bid", weights, self.value(x))).relu() @ self.table


class CrossAttention(nn.Module):
    """Scaled dot-product attention of single heads with a value width of its own, and other tokens as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(4, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in (self.query(x), self.key(other), self.value(other)))
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Recurring(nn.Module):
    """A shared convolution at two resolutions, and weights computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.body = nn.utils.parametrizations.weight_norm(self.body)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x)).relu()
        return self.head(self.body(F.avg_pool2d(x, 2)).relu())


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "plain": (Plain, (image(),)),
    "residual": (lambda: Residual((8, 16), 1), (image(2, 3, 12, 12),)),
    "mobile": (Mobile, (image(1, 3, 16, 16),)),
    "convolutions": (Convolutions, (image(2, 3, 8, 8),)),
    "fused attention": (Attention, (image(2, 7, 12),)),
    "cross attention": (CrossAttention, (image(2, 5, 6), image(2, 9, 4))),
    "products": (Products, (image(2, 5, 6),)),
    "shared and computed weights": (Recurring, (image(),)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), (image(2, 5, 16),)),
}


def counted(model: nn.Module, example: tuple[Any, ...]) -> int:
    """FLOPs as PyTorch counts them, with gradients on: fused inference kernels count as nothing."""
    with FlopCounterMode(display=False) as counter:
        model(*example)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", NETS)
def test_costs_agree_with_torch_before_and_after_random_cuts(name: str) -> None:
    make, example = NETS[name]
    model = filled(make())
    channels = attrim.trace(model, example)
    assert 2 * channels.cost.macs() == counted(model, example)
    assert channels.cost.params() == sum(p.numel() for p in model.parameters())
    assert channels.cost.channels() == sum(g.size for g in channels)
    seen = set()
    for seed in range(5):
        plan = kept_at_random(channels, seed)
        small = attrim.apply(model, plan)
        kept = {g: note["kept"] for g, note in plan.groups.items()}
        assert 2 * channels.cost.macs(kept) == counted(small, example)
        assert channels.cost.params(kept) == sum(p.numel() for p in small.parameters())
        assert plan.provenance["macs_after"] == channels.cost.macs(kept)
        assert plan.provenance["params_after"] == channels.cost.params(kept)
        assert plan.provenance["channels_after"] == sum(kept.values())
        seen.add(channels.cost.macs(kept))
    assert len(seen) > 1
    assert max(seen) < channels.cost.macs()


def test_a_pruned_network_traced_again_costs_what_the_plan_said() -> None:
    model, example = filled(Mobile()), image(1, 3, 16, 16)
    plan = kept_at_random(attrim.trace(model, example), seed=1, least=3)
    again = attrim.trace(attrim.apply(model, plan), example)
    assert again.cost.macs() == plan.provenance["macs_after"]
    assert again.cost.params() == plan.provenance["params_after"]
    assert again.fingerprint == plan.provenance["fingerprint_after"]


def test_the_batch_counts_and_so_does_the_resolution() -> None:
    model = filled(Plain())
    one = attrim.trace(model, image(1, 3, 8, 8)).cost
    assert one.macs() == 64 * (27 * 8 + 72 * 12) + 12 * 5
    assert attrim.trace(model, image(3, 3, 8, 8)).cost.macs() == 3 * one.macs()
    assert attrim.trace(model, image(1, 3, 16, 8)).cost.macs() == 128 * (27 * 8 + 72 * 12) + 12 * 5
    assert one.macs([2, 12]) == 64 * (27 * 2 + 18 * 12) + 12 * 5
