"""Products of activations, bare parameters with several axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import image, pattern, tokens


@pattern("correlation_volume", "a.weight:0", "b.weight:0", "head.weight:1", producers=("a.*:0", "b.*:0"))
class CorrelationVolume(nn.Module):
    """Optical flow: features of two images are multiplied and summed over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.mid, self.head = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x.flip(-1))
        volume = torch.stack([(a * b).sum(1), (a * b.roll(1, -1)).sum(1)], 1)
        return self.head(F.relu(self.mid(volume)))


@pattern(
    "gram_matrix",
    "conv1.weight:0",
    "fc2.weight:1",
    note="the flattened C x C product merges two channel axes: conv2 stays, or rows and columns go",
)
class GramMatrix(nn.Module):
    """Bilinear pooling: the outer product of channels is flattened into a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(36, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(2)
        gram = torch.bmm(x, x.transpose(1, 2)) / x.shape[2]
        return self.fc2(F.relu(self.fc1(gram.flatten(1))))


@pattern(
    "transposed_attention",
    "mid.weight:0",
    inexact=("softmax", "over channels"),
    independent_oracle=False,
    note="a softmax over channels: q and k stay, or their cut is inexact",
)
class TransposedAttention(nn.Module):
    """Restormer: attention between channels instead of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 10, 1)
        self.mid, self.head = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2) for t in self.qkv(x).chunk(3, dim=1))
        attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)
        return self.head(F.relu(self.mid(F.relu(self.proj((attention @ v).unflatten(2, (8, 8)))))))


@pattern("parameter_list_mix", "stem.weight:0", "mix.0:0", "scale.a:0", "head.weight:1", consumers=("mix.*:1",))
class ParameterListMix(nn.Module):
    """Parameters in a list and in a dictionary, used by F.linear on a channels-last copy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(12, 4)
        self.mix = nn.ParameterList([torch.randn(12, 8) / 3])
        self.scale = nn.ParameterDict({"a": torch.ones(12)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).permute(0, 2, 3, 1)
        return self.head(F.relu(F.linear(x, self.mix[0]) * self.scale["a"]))


@pattern(
    "bilinear_layer",
    "a.weight:0",
    "b.weight:0",
    "pair.weight:0",
    "head.weight:1",
    inputs=image(3, 6),
    consumers=("pair.weight:[12]",),
)
class BilinearLayer(nn.Module):
    """nn.Bilinear: a weight with two input axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair, self.head = nn.Linear(6, 8), nn.Linear(6, 10), nn.Bilinear(8, 10, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.pair(F.relu(self.a(x)), F.relu(self.b(x)))))


@pattern(
    "mixture_of_experts",
    "embed.weight:0",
    "head.weight:1",
    inputs=tokens(2, 5, 6),
    inexact=("softmax",),
    independent_oracle=False,
    consumers=("w1:1",),
    note="experts and hidden units are merged into one axis; they may stay",
)
class MixtureOfExperts(nn.Module):
    """Dense mixture: expert weights in one tensor (expert x in x out), gates by softmax over the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(10, 4)
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 10, 16) / 3), nn.Parameter(torch.randn(3, 16, 10) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        gates = self.gate(x).softmax(-1)
        hidden = F.gelu(torch.einsum("bnd,edh->bneh", x, self.w1))
        return self.head(x + torch.einsum("bneh,ehd,bne->bnd", hidden, self.w2, gates))
