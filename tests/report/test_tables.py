"""Tables: text, Markdown, and the words for a change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.core.axes import Axis
from attrim.core.channels import PinnedAxis, Reason
from attrim.report import (
    Figures,
    Table,
    branch_table,
    channel_table,
    comparison_table,
    pinned_table,
    sum_table,
)
from attrim.report.tables import quantity

TABLE = Table("t", ("name", "n"), (("x", "1"), ("long", "12")), frozenset({1}))


def test_text_is_aligned():
    assert TABLE.text() == "t\nname   n\nx      1\nlong  12"


def test_markdown():
    assert TABLE.markdown() == "| name | n |\n| --- | ---: |\n| x | 1 |\n| long | 12 |"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (999, "", "999"),
        (855_770, "", "855.77 k"),
        (125_485_696, "", "125.49 M"),
        (4.1e9, "", "4.10 G"),
        (3_400, "B", "3.40 kB"),
    ],
)
def test_quantities(value, unit, text):
    assert quantity(value, unit) == text


def test_comparison():
    table = comparison_table(
        Figures(1000, 100, 0.9, 4000, 2.0), Figures(500, 60, 0.885, 2400, 1.0), latency="latency, cpu"
    )
    assert table.rows == (
        ("accuracy", "90.00%", "88.50%", "-1.50 points"),
        ("MACs", "1.00 k", "500", "50.0% kept"),
        ("parameters", "100", "60", "60.0% kept"),
        ("weights file", "4.00 kB", "2.40 kB", "60.0% kept"),
        ("latency, cpu", "2.00 ms", "1.00 ms", "2.00 x as fast"),
    )
    assert [row[0] for row in comparison_table(Figures(2, 2), Figures(1, 1)).rows] == ["MACs", "parameters"]


def test_channels_and_pins_of_a_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    assert channel_table(channels).rows == (("0", "8", "3", "yes"),)
    pins = pinned_table(channels)
    assert pins.rows[0][0] in {"0.weight:1", "2.weight:0"}
    output = next(row for row in pins.rows if "output" in row[2])
    assert (output[0], output[1]) == ("2.weight:0", "+1")  # the weight and its bias, one reason


def test_one_line_of_code_in_many_modules_is_one_row():
    def pin(tensor: str, module: str, text: str = "picked by number") -> PinnedAxis:
        return PinnedAxis(Axis(tensor, 0), np.arange(2), 4, Reason(text, "aten.unbind.int", module, "vit.py:12"))

    pins = (pin("a.w", "a"), pin("a.b", "a"), pin("b.w", "b"), pin("c.w", "c"), pin("d.w", "d", "other"))
    channels = attrim.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    assert pinned_table(dataclasses.replace(channels, pinned=pins)).rows == (
        (
            "a.w:0 (2 of 4)",
            "+3",
            "picked by number (aten.unbind.int, in module 'a', at vit.py:12); likewise in 2 other modules",
        ),
        ("d.w:0 (2 of 4)", "", "other (aten.unbind.int, in module 'd', at vit.py:12)"),
    )


class Sums(nn.Module):
    """A branch in a branch, a projection that stays, and two sums without a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.inner, self.project, self.wide = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(4, 5, 1),
            nn.Conv2d(4, 5, 3, padding=1),
        )
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.up(x)
        x = x + self.down(h + self.inner(h))
        x = x + self.pool(x)
        x = x.relu() + self.pool(x)
        return self.project(x) + self.wide(x)


def test_branches_with_what_they_save_and_sums_without() -> None:
    channels = attrim.trace(Sums(), torch.zeros(1, 3, 5, 5))
    table = branch_table(channels)
    assert table.title == "3 residual branches that can be dropped whole"
    whole = channels.cost.macs()
    inner = 6 * 6 * 9 * 25
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["inner"] == (f"{inner / 1e3:.2f} k", f"{inner / whole:.1%}", "yes", "the input, inside up")
    assert rows["wide"][-1] == "its shortcut"
    outer = inner + 2 * 4 * 6 * 25
    assert rows["up"] == (f"{outer / 1e3:.2f} k", f"{outer / whole:.1%}", "yes", "the input")
    sums = sum_table(channels)
    assert sums.title == "2 sums of which no side can be dropped"
    ((where, more, why),) = sums.rows
    assert (where, more) == ("the model", "+1")
    assert why.startswith("not a branch: no parameter lies on one of its sides alone (")
    assert Path(__file__).name in why
