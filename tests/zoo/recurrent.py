"""Recurrent layers: the hidden width is tied through time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import image, pattern, tokens

ROWS = ("rnn.weight_*:0", "rnn.bias_*:0")
"""A hidden unit whose gates all read zero stays at zero, in the LSTM and in the GRU."""

COLUMNS = ("rnn.weight_ih_*:1",)
"""What the recurrent layers read from the layer before."""


@pattern(
    "lstm",
    "rnn.weight_ih_l0:0",
    "rnn.weight_hh_l0:[01]",
    "rnn.bias_hh_l0:0",
    "rnn.weight_ih_l0:1",
    "fc.weight:1",
    inputs=tokens(2, 5, 6),
    consumers=COLUMNS,
    producers=ROWS,
)
class LSTM(nn.Module):
    """A linear layer, an LSTM and a classifier on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Linear(6, 10), nn.LSTM(10, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(torch.tanh(self.embed(x)))
        return self.fc(out[:, -1])


@pattern(
    "gru",
    "rnn.weight_ih_l0:0",
    "rnn.weight_hh_l0:[01]",
    "rnn.bias_ih_l0:0",
    "rnn.weight_ih_l0:1",
    "fc.weight:1",
    inputs=tokens(2, 5, 6),
    consumers=COLUMNS,
    producers=ROWS,
)
class GRU(nn.Module):
    """The same with a GRU, read at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Linear(6, 10), nn.GRU(10, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(torch.tanh(self.embed(x)))
        return self.fc(F.relu(out))


@pattern("crnn", "conv.weight:0", "fc.weight:0", inputs=image(2, 1, 4, 10), consumers=COLUMNS, producers=ROWS)
class CRNN(nn.Module):
    """Text recognition: columns of a feature map become steps; two layers, both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.rnn = nn.LSTM(32, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.fc, self.out = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        out, _ = self.rnn(x.permute(0, 3, 1, 2).flatten(2))
        return self.out(F.relu(self.fc(out)))


@pattern(
    "gru_cell",
    "embed.weight:0",
    "cell.weight_ih:1",
    "fc.weight:0",
    inputs=tokens(2, 4, 6),
    consumers=("cell.weight_ih:1",),
    producers=("cell.weight_*:0", "cell.bias_*:0"),
)
class GRUCell(nn.Module):
    """A GRUCell unrolled in Python from a fresh zero state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Linear(6, 10), nn.GRUCell(10, 12)
        self.fc, self.out = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), self.cell.hidden_size)
        for t in range(x.size(1)):
            h = self.cell(F.relu(self.embed(x[:, t])), h)
        return self.out(F.relu(self.fc(h)))
