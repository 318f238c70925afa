"""``trace(check=True)``: what only numbers can refute is pinned, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from nets import Plain, filled, image, kept_at_random

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor filled with the width": lambda x: x * torch.full((1,), float(x.shape[1])),
    "a scalar tensor of the width": lambda x: x * torch.tensor(float(x.shape[1])),
    "ones counted": lambda x: x * torch.ones(x.shape[1]).sum(),
    "a template filled with the width": lambda x: x + torch.full_like(x, 1 / x.shape[1]),
    "a keyword number": lambda x: torch.add(x, x, alpha=x.shape[1]),
    "a divisor of a pool": lambda x: F.avg_pool2d(x, 2, divisor_override=x.shape[1]),
}


class Hidden(nn.Module):
    """A number that follows the width where labels cannot see it; a second layer behind it is innocent."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.guilty, self.innocent, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.innocent(HIDDEN[self.name](self.guilty(x).relu())).relu())


@pytest.mark.parametrize("name", HIDDEN)
def test_numbers_refute_what_labels_cannot_see(name: str) -> None:
    model, example = filled(Hidden(name)), image()
    blind = attrim.trace(model, example)
    assert {g.id: g.effects for g in blind} == {"guilty": (), "innocent": ()}
    plan = attrim.plan_from_kept(blind, {"guilty": [0, 2, 5]})
    wrong = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert not wrong.ok
    assert wrong.max_error > 1e-3
    seeing = attrim.trace(model, example, check=True)
    assert {g.id: g.size for g in seeing} == {"innocent": 6}
    text = seeing.explain("guilty.weight:0")
    assert "all pinned: removing its channels changes more than zeroing them does" in text
    assert "a number in the code depends on the width" in text
    assert "all pinned: removing its channels" in seeing.explain("guilty.bias:0")
    plan = kept_at_random(seeing)
    assert attrim.verify(model, attrim.apply(model, plan), plan, example).max_error < 1e-12


@pytest.mark.parametrize("net", [Plain, lambda: Hidden("ones counted")], ids=["plain", "hidden"])
def test_checking_twice_gives_the_same_map(net: Callable[[], nn.Module]) -> None:
    model = filled(net())
    first, second = (attrim.trace(model, image(), check=True) for _ in range(2))
    assert first.table() == second.table()


def test_a_sound_network_loses_nothing_by_the_check() -> None:
    model = filled(Plain())
    assert attrim.trace(model, image(), check=True).table() == attrim.trace(model, image()).table()


def test_two_guilty_groups_are_both_found() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 6), (6, 9), (9, 2)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu() * torch.tensor(float(self.a.out_channels))
            x = self.c(self.b(x).relu()).relu()
            return self.d(x / torch.full((), float(x.shape[1])))

    channels = attrim.trace(filled(Two()), image(), check=True)
    assert {g.id: g.size for g in channels} == {"b": 6}
    for name in ("a.weight:0", "c.weight:0"):
        assert "a number in the code depends on the width" in channels.explain(name)
