"""Control flow that depends on data: fake tensors cannot go on there, so the model runs for real."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import TraceError
from nets import filled, image, kept_at_random


class Branches(nn.Module):
    """Bright images take one way, dark ones the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)
        self.bright, self.dark = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.head(self.bright(y) if x.mean() > 0 else self.dark(y))


class Repeats(nn.Module):
    """As many steps as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(int(steps)):
            x = self.step(x).relu()
        return self.head(x)


@pytest.mark.parametrize(("sign", "taken", "other"), [(1, "bright", "dark"), (-1, "dark", "bright")])
def test_the_branch_that_the_example_takes_is_traced(sign: int, taken: str, other: str) -> None:
    model, example = filled(Branches()), sign * image().abs()
    channels = attrim.trace(model, example)
    assert {g.id: g.size for g in channels} == {"stem": 8, taken: 6}
    assert "not used in the run on these example inputs" in channels.explain(f"{other}.weight:0")
    plan = kept_at_random(channels, seed=2)
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact) == (True, True)
    assert check.max_error < 1e-12


@pytest.mark.parametrize(("steps", "groups"), [(0, ["stem"]), (1, ["stem", "step"]), (4, ["stem"])])
def test_a_loop_runs_as_often_as_the_data_says(steps: int, groups: list[str]) -> None:
    model, example = filled(Repeats()), (image(2, 4), torch.tensor(steps))
    channels = attrim.trace(model, example)
    assert channels.cost.macs() == 2 * (4 * 8 + steps * 8 * 8 + 8 * 3)
    assert list(channels.groups) == groups  # from the second step on, input and output are one
    plan = kept_at_random(channels)
    assert attrim.verify(model, attrim.apply(model, plan), plan, example).ok


def test_an_error_in_the_real_run_is_the_one_reported() -> None:
    class Picky(Branches):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e6:
                return super().forward(x)
            raise ValueError("expected a brighter image")

    with pytest.raises(TraceError, match="ValueError: expected a brighter image"):
        attrim.trace(filled(Picky()), image())
