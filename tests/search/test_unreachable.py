"""Budgets that cannot be met, scores that do not fit, networks without anything to prune: each says why."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import attrim
from attrim import Budget, ChannelMap, Scores
from attrim.errors import BudgetError, CriterionError, InputError
from nets import filled, image, random_scores


def refused(channels: ChannelMap, /, **limits: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        attrim.allocate(channels, random_scores(channels), Budget(**limits))
    return str(caught.value)


def test_the_smallest_reachable_value_is_named_and_can_be_reached(plain: ChannelMap) -> None:
    text = refused(plain, macs=0.01)
    found = re.search(r"macs 0\.010 asked, smallest reachable (0\.\d{4}) \(([\d,]+) of 138,360\)", text)
    assert found
    least = int(found[2].replace(",", ""))
    assert least == plain.cost.macs([1, 2])  # a tenth of 8 and of 12, rounded up
    plan = attrim.allocate(plain, random_scores(plain), Budget(macs=(least + 0.5) / 138_360))
    assert plan.provenance["macs_after"] == least


def test_the_floors_are_named_as_what_blocks(plain: ChannelMap) -> None:
    text = refused(plain, params=0.2, min_keep=0.75, max_removed=0.9, multiple_of=2)
    assert "What blocks it: the floors min_keep=0.75, max_removed=0.9, multiple_of=2" in text
    bare = plain.cost.params([1, 1]) / plain.cost.params()
    assert f"(with one channel per group {bare:.4f} of the params would remain)" in text
    least = plain.cost.params([6, 10])
    assert f"params 0.200 asked, smallest reachable {least / 1197:.4f} ({least:,} of 1,197)" in text


def test_every_broken_limit_is_listed_and_no_other(plain: ChannelMap) -> None:
    text = refused(plain, macs=0.3, params=0.3, channels=0.99, min_keep=0.8)
    assert "macs 0.300 asked" in text
    assert "params 0.300 asked" in text
    assert "channels 0.990 asked" not in text


def test_frozen_groups_and_pinned_axes_are_named(plain: ChannelMap) -> None:
    text = refused(plain, macs=0.05, frozen=("conv1.*",))
    assert "1 of 2 groups are frozen or without scores" in text
    assert "3 axes are pinned, for example conv1.weight:1: contracted with an axis that does not follow the cut" in text
    assert f"smallest reachable {plain.cost.macs([8, 2]) / 138_360:.4f}" in text


def test_a_network_without_groups_says_what_holds_it() -> None:
    channels = attrim.trace(filled(nn.Sequential(nn.Linear(3, 4))), image(2, 3))
    with pytest.raises(BudgetError) as caught:
        attrim.allocate(channels, Scores({}, "none"), Budget(macs=0.5))
    assert "nothing in this network can be pruned. 3 axes are pinned, for example" in str(caught.value)
    assert "0.weight:0: is an output of the network" in str(caught.value)


def test_scores_for_nothing_are_refused(plain: ChannelMap) -> None:
    with pytest.raises(BudgetError, match="every group is frozen or without scores, so nothing can be pruned"):
        attrim.allocate(plain, Scores({}, "none"), Budget(macs=0.5))


def test_scores_that_do_not_fit_are_refused(plain: ChannelMap) -> None:
    with pytest.raises(CriterionError, match="criterion 'mine' gave 7 scores for group 'conv1' of 8 channels"):
        attrim.allocate(plain, Scores({"conv1": range(7)}, "mine"), Budget(macs=0.5))
    with pytest.raises(CriterionError) as caught:
        attrim.allocate(plain, Scores({"conv9": range(8)}, "mine"), Budget(macs=0.5))
    assert "criterion 'mine' scored the group 'conv9', which the channel map does not have" in str(caught.value)


@pytest.mark.parametrize("budget", [0.5, {"macs": 0.5}, None])
def test_something_else_than_a_budget_is_refused(plain: ChannelMap, budget: Any) -> None:
    with pytest.raises(
        InputError, match=r"budget: expected an attrim\.Budget, found .*For example attrim\.Budget\(macs=0\.5\)"
    ):
        attrim.allocate(plain, random_scores(plain), budget)
