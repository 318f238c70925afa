"""A plan from kept channels: every position of every member, and a refusal for anything that is no selection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attrim
from attrim import ChannelMap
from attrim.errors import InputError
from nets import Attention, filled, image


@pytest.fixture(scope="module")
def attention() -> ChannelMap:
    return attrim.trace(filled(Attention()), image(2, 7, 12))


def test_all_members_are_cut_along_their_axes(plain: ChannelMap) -> None:
    plan = attrim.plan_from_kept(plain, {"conv1": [5, 1], "conv2": [0, 2, 11]})
    assert {name: dict(cut.keep) for name, cut in plan.cuts.items()} == {
        "conv1.weight": {0: (1, 5)},
        **{f"bn1.{n}": {0: (1, 5)} for n in ("weight", "bias", "running_mean", "running_var")},
        "conv2.weight": {0: (0, 2, 11), 1: (1, 5)},
        "conv2.bias": {0: (0, 2, 11)},
        **{f"bn2.{n}": {0: (0, 2, 11)} for n in ("weight", "bias", "running_mean", "running_var")},
        "head.weight": {1: (0, 2, 11)},
    }
    assert plan.cuts["conv2.weight"].shape_before == (12, 8, 3, 3)
    assert plan.cuts["conv2.weight"].shape_after == (3, 2, 3, 3)
    assert plan.fingerprint == plain.fingerprint


def test_channels_with_several_positions_lose_all_of_them(attention: ChannelMap) -> None:
    plan = attrim.plan_from_kept(attention, {"qkv": [2]})
    rows = tuple(part * 24 + 12 + d for part in range(3) for d in range(6))
    assert plan.cuts["qkv.weight"].keep == {0: rows}
    assert plan.cuts["proj.weight"].keep == {1: tuple(range(12, 18))}
    rule = plan.attributes[""]["num_heads"]
    assert (rule.before, rule.after) == (4, 1)


def test_groups_that_are_not_named_and_whole_groups_stay(plain: ChannelMap) -> None:
    plan = attrim.plan_from_kept(plain, {"conv2": range(12)})
    assert (plan.cuts, plan.attributes) == ({}, {})
    assert {g: (n["size"], n["kept"]) for g, n in plan.groups.items()} == {"conv1": (8, 8), "conv2": (12, 12)}


@pytest.mark.parametrize(
    "kept", [[1, 5], (5, 1), range(1, 6, 4), np.array([5, 1]), torch.tensor([1, 5]), [5, 1, 1, 5]], ids=repr
)
def test_any_sequence_of_indices_will_do(plain: ChannelMap, kept: Any) -> None:
    assert attrim.plan_from_kept(plain, {"conv1": kept}).cuts["conv1.weight"].keep == {0: (1, 5)}


@pytest.mark.parametrize("kept", [[], [8], [-1], [0, 3, 99]], ids=str)
def test_selections_outside_the_group_are_refused(plain: ChannelMap, kept: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        attrim.plan_from_kept(plain, {"conv1": kept})
    assert f"group 'conv1' has channels 0 … 7 and keeps at least one; found {kept}" in str(caught.value)


MASK = [True, False, True, True, True, True, True, False]
IN_WORDS = (0, 2, 3, 4, 5, 6)

DOUBTFUL: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mask": (MASK, IN_WORDS),
    "mask array": (np.array(MASK), IN_WORDS),
    "mask tensor": (torch.tensor(MASK), IN_WORDS),
    "mask of another length": (MASK[:5], ()),
    "fractions": ([0.5, 1.5], ()),
    "whole floats": ([1.0, 5.0], (1, 5)),
    "two dimensions": (np.array([[0, 1], [2, 3]]), ()),
    "set": ({1, 5}, (1, 5)),
    "text": ("ab", ()),
    "None": (None, ()),
    "one number": (3, (3,)),
}


@pytest.mark.parametrize(("kept", "meant"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_doubtful_selection_is_understood_or_refused_but_never_misread(
    plain: ChannelMap, kept: Any, meant: tuple[int, ...]
) -> None:
    try:
        found = attrim.plan_from_kept(plain, {"conv1": kept}).cuts["conv1.weight"].keep[0]
    except InputError as error:
        found, text = meant, str(error)
        assert "conv1" in text
    assert found == meant


def test_an_unknown_group_is_refused(plain: ChannelMap) -> None:
    with pytest.raises(InputError, match=r"unknown group 'conv9'\. The groups are: conv1, conv2"):
        attrim.plan_from_kept(plain, {"conv9": [0]})


def test_costs_and_story_are_filled_in(plain: ChannelMap) -> None:
    plan = attrim.plan_from_kept(plain, {"conv1": [0, 1]}, {"criterion": "by hand"})
    cost = plain.cost
    assert plan.provenance["macs_before"] == cost.macs()
    assert plan.provenance["macs_after"] == cost.macs({"conv1": 2})
    assert plan.provenance["params_after"] == cost.params({"conv1": 2})
    assert (plan.provenance["channels_before"], plan.provenance["channels_after"]) == (20, 14)
    assert plan.provenance["criterion"] == "by hand"
    assert plan.groups["conv1"] == {
        "size": 8, "kept": 2, "exact": True, "axes": [str(m.axis) for m in plain["conv1"].members],
    }  # fmt: skip
