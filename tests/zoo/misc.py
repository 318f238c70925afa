"""Outputs that must not change, several outputs, detached branches, constants, control flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .chains import conv_bn
from .pattern import pattern, tokens


@pattern("output_is_feature", "conv1.weight:0", "bn1.weight:0", must_refuse=("conv2.weight:0", "bn2.weight:0"))
class OutputIsFeature(nn.Module):
    """A backbone: what it returns keeps its width, what lies inside can go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


@pattern("multi_output_dict", "stem.0.weight:0", "tower.0.weight:0", "boxes.weight:1", "scores.weight:1")
class MultiOutputDict(nn.Module):
    """A detector's outputs: a dictionary with a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tower = conv_bn(3, 8), conv_bn(8, 12)
        self.boxes, self.scores, self.aux = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 3, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        stem = self.stem(x)
        x = self.tower(stem)
        return {"boxes": self.boxes(x), "rest": (self.scores(x).sigmoid(), self.aux(stem.mean((2, 3)))), "stride": 1}


@pattern(
    "multi_input_tuple",
    "a.weight:0",
    "b.weight:0",
    "head.weight:1",
    inputs=lambda g: (
        torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64),
        (torch.randn(2, 2, 8, 8, generator=g, dtype=torch.float64),),
    ),
)
class MultiInput(nn.Module):
    """Two inputs, one of them inside a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(2, 10, 3), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor, extra: tuple[Tensor]) -> Tensor:
        return self.head(F.relu(self.a(x) + self.b(extra[0])))


@pattern("detach_branch", "stem.0.weight:0", "gate.0.weight:0", "gate.2.weight:0", "head.weight:1")
class DetachBranch(nn.Module):
    """A gate is computed from a detached copy: autograd does not see the link."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 12), nn.Conv2d(12, 5, 1)
        self.gate = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * self.gate(x.detach().mean((2, 3), keepdim=True)))


@pattern(
    "fixed_int_attr",
    "conv1.weight:0",
    "fc2.weight:1",
    expect="refused",
    must_refuse=("conv2.weight:0",),
    note="the view's width is a constant of the class, shared by all its instances; no instance can follow a cut",
)
class FixedIntAttr(nn.Module):
    """A view with a number of the model's own."""

    WIDTH = 12

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, self.WIDTH, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * self.WIDTH, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 16 * FixedIntAttr.WIDTH))))


@pattern(
    "fixed_literal_groups",
    "conv1.weight:0",
    "head.weight:0",
    expect="refused",
    must_refuse=("conv2.weight:0",),
    note="both factors of the channel axis are literals",
)
class FixedLiteralGroups(nn.Module):
    """Channels are viewed as 3 x 4 with both numbers written down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.head, self.out = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        x = x.view(2, 3, 4, 8, 8).softmax(dim=2).view(2, 12, 8, 8)
        return self.out(F.relu(self.head(x)))


@pattern(
    "sort_channels",
    "conv1.weight:0",
    "out.weight:0",
    expect="refused",
    must_refuse=("conv2.weight:0",),
    note="sorting along the channels depends on all of them together",
)
class SortChannels(nn.Module):
    """A channel-wise sort, for which no rule of removal can exist."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.out, self.head = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sort(self.conv2(F.relu(self.conv1(x))), dim=1).values
        return self.head(F.relu(self.out(x)))


@pattern(
    "softmax_channels",
    "conv1.weight:0",
    "mid.weight:0",
    inexact=("softmax",),
    independent_oracle=False,
    note="a softmax over channels is shared by all of them: stay, or be called inexact",
)
class SoftmaxChannels(nn.Module):
    """A softmax over the channels of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.mid, self.head = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x))).softmax(dim=1)
        return self.head(F.relu(self.mid(x)))


@pattern("data_dependent", "conv1.weight:0", "conv2.weight:0", "head.weight:1")
class DataDependent(nn.Module):
    """A branch on the data itself: only a real run can take it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        if x.abs().sum() > 0:
            x = F.relu(self.conv2(x))
        return self.head(x)


@pattern("unused_module", "conv1.weight:0", "head.weight:1")
class UnusedModule(nn.Module):
    """A layer that forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 5, 1)
        self.never = nn.Conv2d(10, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv1(x)))


@pattern("checkpointed", "conv1.weight:0", "conv2.weight:0", "head.weight:1")
class Checkpointed(nn.Module):
    """Activation checkpointing around a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)
        self.head = nn.Conv2d(12, 5, 1)

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + checkpoint(self._branch, x, use_reentrant=False))


@pattern(
    "fft_mixer",
    "fc1.weight:0",
    "head.weight:1",
    inputs=tokens(2, 6, 5),
    note="complex numbers: embed stays where the transform has no rule, the MLP behind it goes in any case",
)
class FFTMixer(nn.Module):
    """FNet mixing over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.head = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + torch.fft.fft(x, dim=1).real
        return self.head(F.gelu(self.fc1(x)))
