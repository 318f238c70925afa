"""Code that looks harmless and breaks naive pruning: numbers taken from widths, positions that matter, hidden links."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import pattern

NUMBER = ("number", "scale")


class _Stem(nn.Module):
    """Two convolutions whose second output the subclasses treat in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.mid, self.head = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))

    def tail(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(x)))


BOTH = ("conv1.weight:0", "mid.weight:0")


@pattern(
    "mean_by_hand",
    *BOTH,
    inexact=NUMBER,
    independent_oracle=False,
    note="the divisor is the width, a Python number: conv2 stays, or its cut is called inexact",
)
class MeanByHand(_Stem):
    """A mean over channels written as a sum and a division by the width."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.tail(x - x.sum(1, keepdim=True) / x.shape[1])


@pattern("l2_normalise", *BOTH, "conv2.weight:0", producers=("conv2.*:0",))
class L2Normalise(_Stem):
    """F.normalize over channels: removed zeros count for nothing, so it is exact."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.normalize(self.body(x), dim=1))


@pattern("global_mean", *BOTH, inexact=("over channels",), independent_oracle=False)
class GlobalMean(_Stem):
    """The mean of everything, channels included, is subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.tail(x - x.mean(dim=(1, 2, 3), keepdim=True))


@pattern(
    "channel_flip_add",
    "conv1.weight:0",
    "mid.weight:0",
    note="channel c meets channel C-1-c: a pair at a time can go, or conv2 stays",
)
class ChannelFlipAdd(_Stem):
    """A tensor plus its mirror image along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.tail(x + x.flip(1))


@pattern("channel_roll_add", *BOTH, note="every channel meets its neighbour: conv2 stays")
class ChannelRollAdd(_Stem):
    """A tensor plus itself shifted by one channel."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.tail(x + torch.roll(x, 1, dims=1))


@pattern("channel_cumsum", *BOTH, must_refuse=("conv2.weight:0",))
class ChannelCumsum(_Stem):
    """A running sum along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x).cumsum(1))


@pattern("local_response_norm", *BOTH, note="each channel is divided by its neighbours' energy: conv2 stays")
class LocalResponseNorm(_Stem):
    """AlexNet's norm slides along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.lrn = nn.LocalResponseNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.lrn(self.body(x)))


@pattern("even_odd_channels", *BOTH, note="every second channel by a strided slice: pairs go together, or conv2 stays")
class EvenOddChannels(_Stem):
    """Even channels are gated by odd ones and written next to themselves."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        even, odd = x[:, ::2], x[:, 1::2]
        return self.tail(torch.cat([even * odd, odd], 1))


@pattern("last_channels", *BOTH, note="x[:, -4:]: the last four stay, the others can go")
class LastChannels(_Stem):
    """The last four channels are summed into a gate for all."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.tail(x * torch.sigmoid(x[:, -4:].sum(1, keepdim=True)))


@pattern("single_channel_gate", *BOTH, note="x[:, 0:1] must stay channel 0")
class SingleChannelGate(_Stem):
    """The first channel gates all the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.tail(x * torch.sigmoid(x[:, 0:1]) + x[:, 3].unsqueeze(1))


@pattern("write_into_buffer", *BOTH, note="channels are written into a fresh tensor at fixed places")
class WriteIntoBuffer(_Stem):
    """A zero tensor of the output's shape is filled piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        out = torch.zeros_like(x)
        out[:, :6] = x[:, 6:]
        out[:, 6:] = x[:, :6] * 0.5
        return self.tail(out)


@pattern("where_mask", *BOTH, "conv2.weight:0")
class WhereMask(_Stem):
    """Values are chosen by a comparison of channels with a threshold per pixel."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        limit = x.mean(1, keepdim=True)
        return self.tail(torch.where(y > limit, y, y.new_zeros(())).masked_fill(y > 3.0, 3.0))


@pattern("topk_channels", *BOTH, must_refuse=("conv2.weight:0",))
class TopkChannels(_Stem):
    """The four largest channels at every pixel, padded back to the width."""

    def forward(self, x: Tensor) -> Tensor:
        top = self.body(x).topk(4, dim=1).values
        return self.tail(torch.cat([top, top, top], 1))


@pattern("shared_norm", "a.weight:0", "b.weight:0", "norm.weight:0", "head.weight:1")
class SharedNorm(nn.Module):
    """One batch norm serves two layers: their channels are tied though they never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(3, 10, 1), nn.BatchNorm2d(10)
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(self.norm(self.a(x))), F.relu(self.norm(self.b(x)))], 1))


@pattern(
    "spectral_norm",
    "mid.weight:0",
    inexact=("weight",),
    independent_oracle=False,
    note="the largest singular value belongs to the whole weight: it stays, or its cut is called inexact",
)
class SpectralNorm(nn.Module):
    """A spectrally normed convolution between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
        self.mid, self.head = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.conv(x)))))
