"""What the tests of DCP-A share: a network with its space, prices and policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attrim
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.widths import SearchSpace, make_space
from attrim.search.limits import Limits, limits_of
from nets import filled, image


class Dense(nn.Module):
    """Three layers, each reading all those before it; then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 6, 3, padding=1)
        self.two = nn.Conv2d(14, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([x, self.one(x).relu()], 1)
        x = torch.cat([x, self.two(x).relu()], 1)
        return self.fc(self.norm(x).relu().mean((2, 3)))


class Nested(nn.Module):
    """A branch in a branch, and in it a product of two activations, which stays when either goes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.one, self.two, self.norm = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 6, 1), nn.BatchNorm2d(6)
        self.q, self.k, self.v = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 6, 1)
        self.mix, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        h = self.down(x).relu()
        h = h + self.norm(self.two(self.one(h).relu()))
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        read = v @ (q.transpose(1, 2) @ k).softmax(-1)
        h = h + self.mix(read.reshape_as(h))
        return self.fc((x + self.up(h)).mean((2, 3)))


@dataclass
class Made:
    """Everything that a search is made of."""

    model: nn.Module
    channels: attrim.ChannelMap
    space: SearchSpace
    limits: Limits
    prices: Prices
    policy: Policy
    x: Tensor


def made(
    network: nn.Module, *, side: int = 8, budget: attrim.Budget | None = None, seed: int = 0, **options: Any
) -> Made:
    """A network in float64 and all of its groups in a search space; ``kind`` goes to the policy."""
    model = filled(network, seed).double()
    x = image(2, 3, side, side, dtype=torch.float64)
    channels = attrim.trace(model, x)
    budget = budget or attrim.Budget(macs=0.5)
    kind = options.pop("kind", "se")
    space = make_space(channels, list(channels.groups), budget, **options)
    limits = limits_of(channels.cost, budget)
    prices = Prices(space, limits)
    generator = torch.Generator().manual_seed(seed)
    ranks = [torch.randperm(channels[g].size, generator=generator) for g in space.groups]
    policy = Policy(space, prices, torch.cat(ranks), kind, seed=seed)
    policy.observe(torch.rand(space.size, generator=generator))
    return Made(model, channels, space, limits, prices, policy, x)
