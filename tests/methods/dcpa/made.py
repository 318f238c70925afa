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
