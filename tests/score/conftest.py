"""Channel maps written by hand, so that criteria are tested without the tracer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from attrim.core.axes import Axis
from attrim.core.channels import ChannelGroup, ChannelMap, Member, Tap
from attrim.core.cost import CostModel, Terms, WidthTable
from attrim.modules.names import named_tensors

Index = Sequence[int] | Sequence[Sequence[int]]


def _table(index: Index | int) -> np.ndarray:
    array = np.arange(index) if isinstance(index, int) else np.asarray(index)
    return array.reshape(len(array), -1).astype(np.int64)


def member(axis: str, index: Index | int, role: str) -> Member:
    tensor, dim = axis.split(":")
    return Member(Axis(tensor, int(dim)), _table(index), role)


def tap(module: str, index: Index | int, kind: str, dim: int = 1) -> Tap:
    return Tap(module, dim, _table(index), kind)


def channel_map(model: nn.Module, *groups: ChannelGroup) -> ChannelMap:
    none = np.zeros(0, dtype=np.int64)
    sizes = np.array([g.size for g in groups], dtype=np.int64)
    no_terms = Terms(none, none.reshape(0, 1))
    cost = CostModel(tuple(g.id for g in groups), sizes, WidthTable(none, none, none, none), no_terms, no_terms)
    shapes = named_tensors(model).shapes
    return ChannelMap({g.id: g for g in groups}, (), cost, "by hand", shapes)


class Build:
    """The builders in one object, so that test files need no import from here."""

    member = staticmethod(member)
    tap = staticmethod(tap)
    map = staticmethod(channel_map)

    @staticmethod
    def group(name: str, members: Sequence[Member], taps: Sequence[Tap] = ()) -> ChannelGroup:
        return ChannelGroup(name, len(members[0].index), tuple(members), tuple(taps))


@pytest.fixture
def build() -> type[Build]:
    return Build


class SmallNet(nn.Module):
    """conv (3 channels) -> norm -> relu -> conv -> mean over pixels; every module is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.relu(self.norm(self.conv1(x)))).mean((2, 3))


@pytest.fixture
def small() -> SmallNet:
    torch.manual_seed(0)
    model = SmallNet()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        model.norm.bias.copy_(torch.tensor([0.1, 0.3, -0.2]))
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def small_map(build: type[Build]) -> Callable[[nn.Module], ChannelMap]:
    def make(model: nn.Module) -> ChannelMap:
        members = [
            build.member("conv1.weight:0", 3, "out"),
            build.member("norm.weight:0", 3, "scale"),
            build.member("norm.bias:0", 3, "shift"),
            build.member("norm.running_mean:0", 3, "state"),
            build.member("conv2.weight:1", 3, "in"),
        ]
        taps = [build.tap("conv1", 3, "conv"), build.tap("norm", 3, "norm"), build.tap("relu", 3, "act")]
        return build.map(model, build.group("conv1", members, taps))

    return make
