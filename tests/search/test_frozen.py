"""Frozen tensors: globs over axis names as they print; one frozen member freezes the group."""

from __future__ import annotations

import pytest

import attrim
from attrim import Budget, ChannelMap
from attrim.errors import BudgetError
from nets import random_scores

pytestmark = pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")  # two groups are coarse


def widths(channels: ChannelMap, *frozen: str, macs: float = 0.7) -> dict[str, int]:
    plan = attrim.allocate(channels, random_scores(channels), Budget(macs=macs, frozen=frozen))
    return {name: note["kept"] for name, note in plan.groups.items()}


@pytest.mark.parametrize(
    ("glob", "whole"),
    [
        ("conv1.weight", "conv1"),  # rows; its columns are the image
        ("conv1.weight:0", "conv1"),
        ("conv1.*", "conv1"),
        ("bn1.running_mean", "conv1"),
        ("bn1.bias:0", "conv1"),
        ("conv2.weight:1", "conv1"),
        ("conv2.weight:0", "conv2"),
        ("head.weight:1", "conv2"),
        ("head.*", "conv2"),
        ("*n2.weight:?", "conv2"),
    ],
)
def test_a_group_with_a_frozen_member_stays_whole_and_the_other_pays(plain: ChannelMap, glob: str, whole: str) -> None:
    kept = widths(plain, glob)
    other = {"conv1": "conv2", "conv2": "conv1"}[whole]
    assert kept[whole] == plain[whole].size
    assert kept[other] < plain[other].size


def test_without_a_dimension_every_axis_of_the_tensor_is_meant(plain: ChannelMap) -> None:
    with pytest.raises(BudgetError, match="every group is frozen or without scores, so nothing can be pruned"):
        widths(plain, "conv2.weight")


def test_several_globs_add_up(residual: ChannelMap) -> None:
    kept = widths(residual, "layers.0.*", "layers.7.conv1.weight:0", macs=0.6)
    assert (kept["conv1"], kept["layers.0.conv1"], kept["layers.7.conv1"]) == (16, 16, 128)
    assert all(kept[g] < residual[g].size for g in ("layers.2.conv1", "layers.6.conv1"))


def test_a_glob_on_pinned_axes_is_no_error_and_freezes_nothing(plain: ChannelMap) -> None:
    assert widths(plain, "head.bias", "conv1.weight:1") == widths(plain)


@pytest.mark.parametrize("typo", ["conv1.wieght", "conv1.weight:4", "Conv1.*", "conv1", "layer*.conv1.weight:0", ""])
def test_a_glob_that_matches_nothing_is_an_error(plain: ChannelMap, typo: str) -> None:
    with pytest.raises(BudgetError) as caught:
        widths(plain, typo)
    assert f"frozen: the glob '{typo}' matches no axis of the model" in str(caught.value)
    assert "Axes look like: conv1.weight:0, conv2.weight:0" in str(caught.value)
