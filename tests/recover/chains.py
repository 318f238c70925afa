"""Networks of two contractions, and cuts between them, for the tests of folding and reconstruction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from attrim import PruningPlan
from attrim.errors import AttrimWarning
from nets import filled, image

__all__ = ["Chain", "Packed", "batches", "calibrated", "copies", "cut", "cut_pairs", "pictures", "quiet", "same"]


class Chain(nn.Module):
    """1x1 convolution -> function -> another contraction, with whatever stands behind."""

    def __init__(self, last: nn.Module, *behind: nn.Module, wide: int = 6, dims: int = 2, act: Any = F.relu) -> None:
        super().__init__()
        self.first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, wide, 1)
        self.last, self.act = last, act
        self.behind = nn.Sequential(*behind)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.last(self.act(self.first(x))))


class Packed(nn.Module):
    """One weight for query, key and value, used whole or in parts, and one with its inputs first."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.first, self.parts = nn.Linear(4, 6), parts
        self.packed, self.bias = nn.Parameter(torch.zeros(9, 6)), nn.Parameter(torch.zeros(9))
        self.back, self.shift = nn.Parameter(torch.zeros(6, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        flat = x.view(-1, x.shape[-1])
        other = torch.addmm(self.shift, flat, self.back).view(*x.shape[:-1], -1)
        if not self.parts:
            return torch.cat([F.linear(x, self.packed, self.bias), other], -1)
        pairs = zip(self.packed.chunk(3), self.bias.chunk(3), strict=True)
        return torch.cat([*(F.linear(x, w, b) for w, b in pairs), other], -1)


def cut(model: nn.Module, example: Any, kept: dict[str, list[int]]) -> tuple[nn.Module, PruningPlan]:
    """The network that keeps some channels of the group to which each named tensor's first axis belongs."""
    channels = attrim.trace(model, example)
    groups = {}
    for name, indices in kept.items():
        (group,) = (g.id for g in channels if any(m.axis.tensor == name and m.axis.dim == 0 for m in g.members))
        groups[group] = indices
    plan = attrim.plan_from_kept(channels, groups)
    return attrim.apply(model, plan), plan


def cut_pairs(model: nn.Module, example: Any) -> tuple[nn.Module, PruningPlan]:
    """Cut channels 3, 4 and 5 of ``first``; see :func:`copies`."""
    return cut(model, example, {"first.weight": [0, 1, 2]})


@torch.no_grad()
def copies(model: Any) -> Any:
    """Random weights of one seed, in float64; channels 3 to 5 of ``first`` are multiples of its channels 0 to 2."""
    model = filled(model.double())
    factor = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    model.first.weight[3:] = model.first.weight[:3] * factor.view(-1, *[1] * (model.first.weight.ndim - 1))
    model.first.bias[3:] = model.first.bias[:3] * factor
    return model


def quiet(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call, in which no :class:`AttrimWarning` may come up."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttrimWarning)
        return call(*args, **options)


def batches(*shape: int, count: int = 3) -> list[Tensor]:
    """Normal noise in float64."""
    return [image(*shape, seed=i, dtype=torch.float64) for i in range(count)]


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same tensors, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def pictures(count: int = 16, seed: int = 0, size: int = 8) -> Tensor:
    """Smooth noise: neighbouring pixels have much in common, and so have the channels that read them."""
    return F.interpolate(image(count, 3, 3, 3, seed=seed), size=(size, size), mode="bilinear")


@torch.no_grad()
def calibrated(net: Any, seed: int = 0) -> Any:
    """Random weights as torch sets them, and the batch-norm statistics of pictures."""
    torch.manual_seed(seed)
    norms = []
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if hasattr(module, "running_var"):
            module.momentum = 1.0
            norms.append(module)
    net.train()(pictures(64, 100))
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()
