"""Candidate widths: floors, multiples, duplicates, groups that decide together, branches that may go."""

from __future__ import annotations

import pytest
import torch

import attrim
from attrim.errors import BudgetError, InputError
from attrim.methods.dcpa.widths import make_space
from nets import Mobile, Plain, Residual, filled


def traced(network: type, side: int = 16) -> attrim.ChannelMap:
    return attrim.trace(filled(network()), torch.zeros(1, 3, side, side))


def test_ratios_become_widths_within_the_floor_and_equal_ones_are_one_candidate() -> None:
    channels = traced(Plain)
    space = make_space(channels, list(channels.groups), attrim.Budget(macs=0.5, min_keep=3))
    assert [u.widths[:, 0].tolist() for u in space.units] == [[3, 4, 5, 6, 7, 8], [3, 4, 6, 7, 9, 10, 12]]
    assert space.most == 7
    assert space.valid().sum(1).tolist() == [6, 7]
    assert space.offsets == {"conv1": 0, "conv2": 8}


def test_multiples_and_groups_narrower_than_them() -> None:
    channels = traced(Plain)
    space = make_space(channels, list(channels.groups), attrim.Budget(macs=0.5, multiple_of=8), ratios=(0.3, 0.6))
    assert [(u.name, u.widths[:, 0].tolist()) for u in space.units] == [("conv2", [8, 12])]


def test_frozen_groups_are_not_searched() -> None:
    channels = traced(Plain)
    space = make_space(channels, list(channels.groups), attrim.Budget(macs=0.5, frozen=("conv1.weight:0",)))
    assert space.groups == ("conv2",)
    with pytest.raises(BudgetError, match="no group is left to search"):
        make_space(channels, list(channels.groups), attrim.Budget(macs=0.5, frozen=("*",)))


def test_groups_of_a_block_choose_one_ratio() -> None:
    channels = traced(Mobile)
    space = make_space(channels, ["stem.0", "last.0", "body.1.project.0"], attrim.Budget(macs=0.5), share="block")
    assert [u.groups for u in space.units] == [("stem.0",), ("body.1.project.0",), ("last.0",)]
    inner = ["layers.1.conv1", "layers.2.conv1"]
    channels = traced(Residual)
    alone = make_space(channels, inner, attrim.Budget(macs=0.5), share="block")
    assert [u.groups for u in alone.units] == [("layers.1.conv1",), ("layers.2.conv1",)]
    both = make_space(channels, [*inner, "layers.2.conv2"], attrim.Budget(macs=0.5), share="block", ratios=(0.5,))
    assert both.units[1].groups == ("layers.2.conv1", "layers.2.conv2")
    assert both.units[1].widths.tolist() == [[16, 16], [32, 32]]


def test_a_branch_that_may_go_has_one_policy_with_the_groups_inside_it() -> None:
    channels = traced(Residual)
    space = make_space(channels, list(channels.groups), attrim.Budget(macs=0.5), drop=True, ratios=(0.5,))
    units = {u.name: u for u in space.units}
    assert units["layers.1"].branch == "layers.1"
    assert units["layers.1"].groups == ("layers.1.conv1",)
    assert units["layers.1"].widths[:, 0].tolist() == [0, 8, 16]
    assert units["conv1"].branch is None
    choice = [0 if u.name == "layers.1" else len(u) - 1 for u in space.units]
    assert space.drops(choice) == ("layers.1",)
    assert "layers.1.conv1" not in space.kept(choice)
    assert space.kept(choice)["layers.3.conv1"] == 32


def test_a_branch_with_a_frozen_tensor_stays() -> None:
    channels = traced(Residual)
    budget = attrim.Budget(macs=0.5, frozen=("layers.1.bn2.weight",))
    space = make_space(channels, list(channels.groups), budget, drop=True)
    assert "layers.1" not in {u.branch for u in space.units}
    assert "layers.3" in {u.branch for u in space.units}


def test_a_branch_without_a_searched_group_may_still_go() -> None:
    channels = traced(Residual)
    space = make_space(channels, ["layers.0.conv1"], attrim.Budget(macs=0.5), drop=True)
    bare = next(u for u in space.units if u.name == "layers.5")
    assert bare.groups == ()
    assert len(bare) == 2
    gates = make_space(channels, ["layers.0.conv1"], attrim.Budget(macs=0.5), drop=True, by_channel=True)
    assert gates.gated == ("layers.0.conv1",)
    assert all(u.groups == () and len(u) == 2 for u in gates.units)
    assert len(gates.units) == 6


@pytest.mark.parametrize("ratios", [(0.0,), (1.5,), (float("nan"),)])
def test_ratios_out_of_range(ratios: tuple[float, ...]) -> None:
    channels = traced(Plain)
    with pytest.raises(InputError, match=r"candidates: expected kept fractions in \(0, 1\]"):
        make_space(channels, list(channels.groups), attrim.Budget(macs=0.5), ratios=ratios)


def test_candidates_are_named_by_the_largest_ratio_that_gives_them() -> None:
    channels = traced(Plain)
    budget = attrim.Budget(macs=0.5, min_keep=3)
    space = make_space(channels, list(channels.groups), budget)
    assert space.units[0].names == ("37.5 %", "50 %", "62.5 %", "75 %", "87.5 %", "100 %")
    space = make_space(channels, list(channels.groups), attrim.Budget(macs=0.5, multiple_of=8), ratios=(0.3, 0.6))
    assert space.units[0].names == ("60 %", "100 %")
    channels = traced(Residual)
    for by_channel in (False, True):
        space = make_space(channels, list(channels.groups), attrim.Budget(macs=0.5), drop=True, by_channel=by_channel)
        assert all(len(u.names) == len(u) and len(set(u.names)) == len(u) for u in space.units)
        assert all((u.names[0] == "drop") == (u.branch is not None) and u.names[-1] == "100 %" for u in space.units)
