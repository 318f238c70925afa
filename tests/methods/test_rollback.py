"""When a proof fails the plan is thrown away: groups are checked in numbers, and either a new plan is proved or nothing is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import Budget, ChannelMap, Scores
from attrim.errors import VerificationError
from nets import filled, image

pytestmark = pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")  # small networks are coarse


class Body(nn.Module):
    """Two convolutions with some code between them, and a third one."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.code(self.first(x).relu())).relu())


def scaled_by_the_width(x: Tensor) -> Tensor:
    return x * torch.full((), float(x.shape[1])) / 8


def averaged_by_hand(x: Tensor) -> Tensor:
    return x * (x.sum(1, keepdim=True) / torch.ones(x.shape[1]).sum()).sigmoid()


def doubled_when_narrow(x: Tensor) -> Tensor:
    return x if x.shape[1] > 4 else x * 2


@pytest.mark.parametrize("code", [scaled_by_the_width, averaged_by_hand])
def test_a_number_computed_from_the_width_is_found_and_pinned(code: Callable[[Tensor], Tensor]) -> None:
    model = filled(Body(code))
    assert {g.id: g.size for g in attrim.trace(model, image())} == {"first": 8, "second": 10}
    result = attrim.prune(model, image(), budget=Budget(params=0.7))
    assert [s["step"] for s in result.steps] == ["cut", "rolled back", "verify"]
    assert result.steps[1]["reason"].startswith("not ok, exact: max error ")
    assert {g.id: g.size for g in result.channels} == {"second": 10}
    assert "a number in the code depends on the width" in result.channels.explain("first.weight:0")
    assert set(result.plan.cuts) == {"second.weight", "second.bias", "head.weight"}
    assert result.model.first.out_channels == 8
    assert result.after.params <= 0.7 * result.before.params
    assert result.verification is not None
    assert result.verification.max_error < 1e-12
    assert attrim.verify(model, result.model, result.plan, image()).ok


def test_a_sound_plan_is_not_rolled_back() -> None:
    result = attrim.prune(filled(Body(torch.relu)), image(), budget=Budget(params=0.5))
    assert [s["step"] for s in result.steps] == ["cut", "verify"]


def test_an_own_criterion_is_asked_again_about_the_new_map() -> None:
    asked: list[list[str]] = []

    def even(model: nn.Module, channels: ChannelMap, data: Any) -> Scores:
        asked.append(list(channels.groups))
        return Scores({g.id: [1.0] * g.size for g in channels}, "even")

    attrim.prune(filled(Body(scaled_by_the_width)), image(), method=even, budget=Budget(params=0.7))
    assert asked == [["first", "second"], ["second"]]


def test_without_the_proof_a_wrong_network_comes_back() -> None:
    model = filled(Body(scaled_by_the_width))
    result = attrim.prune(model, image(), budget=Budget(params=0.7), verify=False)
    assert not attrim.verify(model, result.model, result.plan, image()).ok


def test_what_cannot_be_proved_is_not_returned() -> None:
    model = filled(Body(doubled_when_narrow))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    narrow = Scores({"first": [9.0, 9.0, 9.0, *[0.0] * 5], "second": [9.0] * 10}, "narrow")
    with pytest.raises(VerificationError) as caught:
        attrim.prune(model, image(), method=lambda *_: narrow, budget=Budget(params=0.6, min_keep=3))
    text = str(caught.value)
    assert "the pruned network is not the masked original, so it was thrown away: not ok, exact: max error " in text
    assert "Budget(frozen=...)" in text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_freezing_what_was_named_lets_the_rest_through() -> None:
    model = filled(Body(doubled_when_narrow))
    result = attrim.prune(model, image(), budget=Budget(params=0.7, frozen=("first.*",)))
    assert [s["step"] for s in result.steps] == ["cut", "verify"]
    assert result.model.first.out_channels == 8
