"""Floors, ceilings and multiples of single groups."""

from __future__ import annotations

import math
from typing import Any

import pytest

import attrim
from attrim import Budget, ChannelMap, Scores
from nets import random_scores

pytestmark = pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")  # two groups are coarse


def widths(channels: ChannelMap, scores: Scores | None = None, /, **limits: Any) -> dict[str, int]:
    plan = attrim.allocate(channels, scores or random_scores(channels), Budget(**limits))
    return {name: note["kept"] for name, note in plan.groups.items()}


def worst_first(channels: ChannelMap) -> Scores:
    """The first group is worth nothing, so that only a floor can save it."""
    first = next(iter(channels)).id
    return Scores({g.id: [0.0 if g.id == first else 1.0 + c for c in range(g.size)] for g in channels}, "worst")


def test_the_default_floor_is_a_tenth_rounded_up(residual: ChannelMap) -> None:
    kept = widths(residual, worst_first(residual), macs=0.15)
    assert kept["conv1"] == 2
    assert all(k >= math.ceil(0.1 * residual[g].size) for g, k in kept.items())


@pytest.mark.parametrize("floor", [1, 5, 12])
def test_an_int_is_a_number_of_channels(residual: ChannelMap, floor: int) -> None:
    kept = widths(residual, worst_first(residual), macs=0.3, min_keep=floor)
    assert kept["conv1"] == floor
    assert min(kept.values()) >= floor


@pytest.mark.parametrize("share", [0.25, 0.4, 1 / 3])
def test_a_float_is_a_share_of_the_group_rounded_up(residual: ChannelMap, share: float) -> None:
    kept = widths(residual, worst_first(residual), macs=0.4, min_keep=share)
    assert kept["conv1"] == math.ceil(share * 16 - 1e-9)
    assert all(k >= share * residual[g].size - 1e-9 for g, k in kept.items())


def test_a_floor_above_the_size_leaves_the_group_whole(plain: ChannelMap) -> None:
    kept = widths(plain, macs=0.9, min_keep=10)
    assert kept["conv1"] == 8
    assert 10 <= kept["conv2"] < 12


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_no_group_loses_more_than_its_largest_share(residual: ChannelMap, share: float) -> None:
    kept = widths(residual, worst_first(residual), params=0.8, max_removed=share)
    assert kept["conv1"] == math.ceil(16 * (1 - share))
    assert all(k >= residual[g].size * (1 - share) - 1e-9 for g, k in kept.items())


def test_the_stricter_floor_holds(residual: ChannelMap) -> None:
    assert widths(residual, worst_first(residual), macs=0.5, min_keep=3, max_removed=0.5)["conv1"] == 8
    assert widths(residual, worst_first(residual), macs=0.5, min_keep=11, max_removed=0.5)["conv1"] == 11


def test_at_least_one_channel_always_stays(plain: ChannelMap) -> None:
    kept = widths(plain, channels=0.1, min_keep=1)
    assert kept == {"conv1": 1, "conv2": 1}


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("scope", ["global", "group", "isomorphic"])
@pytest.mark.parametrize("net", ["residual", "mobile"])
def test_every_width_is_a_multiple_or_whole(
    net: str, scope: Any, multiple: int, request: pytest.FixtureRequest
) -> None:
    channels: ChannelMap = request.getfixturevalue(net)
    kept = widths(channels, macs=0.45, multiple_of=multiple, scope=scope)
    assert all(k % multiple == 0 or k == channels[g].size for g, k in kept.items()), kept
    assert any(k < channels[g].size for g, k in kept.items())


def test_a_group_narrower_than_the_multiple_stays_whole(plain: ChannelMap) -> None:
    assert widths(plain, macs=0.9, multiple_of=10) == {"conv1": 8, "conv2": 10}


def test_floors_are_rounded_up_to_the_multiple(residual: ChannelMap) -> None:
    assert widths(residual, worst_first(residual), macs=0.5, multiple_of=4, min_keep=5)["conv1"] == 8
