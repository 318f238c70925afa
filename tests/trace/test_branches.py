"""Residual branches: which side of which sum can go, what goes with it, and what it costs."""

from __future__ import annotations

import pytest
import torch
from nets import Residual, filled

import attrim


@pytest.fixture(scope="module")
def channels() -> attrim.ChannelMap:
    return attrim.trace(filled(Residual((8, 12), blocks=2)), torch.randn(1, 3, 16, 16))


def test_basic_blocks_and_transitions(channels: attrim.ChannelMap) -> None:
    assert [b.id for b in channels.branches] == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert [b.shortcut for b in channels.branches] == ["identity", "identity", "computed", "identity"]
    assert [b.gate for b in channels.branches] == [f"layers.{i}.bn2" for i in range(4)]
    assert all(b.exact for b in channels.branches)
    assert channels.sums == ()


def test_a_block_behind_a_relu_vanishes_whole(channels: attrim.ChannelMap) -> None:
    block = channels.branches[1]
    assert block.modules == ("layers.1",)
    assert {path: r.kind for path, r in block.replacements.items()} == {"layers.1": "identity"}
    assert block.groups == ("layers.1.conv1",)
    assert "layers.1.bn2.running_var" in block.tensors


def test_a_transition_keeps_its_shortcut(channels: attrim.ChannelMap) -> None:
    block = channels.branches[2]
    assert block.modules == ("layers.2.conv1", "layers.2.bn1", "layers.2.conv2", "layers.2.bn2")
    assert not any(name.startswith("layers.2.down") for name in block.tensors)
    first = block.replacements["layers.2.conv1"]
    assert (first.kind, first.width) == ("zeros", 12)
    assert [extent.at(16) for extent in first.shape[2:]] == [8, 8]
    assert [extent.at(7) for extent in first.shape[2:]] == [4, 4]


def test_costs_of_drops(channels: attrim.ChannelMap) -> None:
    cost = channels.cost
    block = 2 * 8 * 8 * 9
    assert cost.macs() - cost.macs(drops=["layers.1"]) == block * 16 * 16
    assert cost.params() - cost.params(drops=["layers.1"]) == block + 4 * 8
    assert cost.channels() - cost.channels(drops=["layers.1"]) == 8
    assert cost.macs({"layers.1.conv1": 2}, drops=["layers.1"]) == cost.macs(drops=["layers.1"])
    assert cost.macs({"layers.1.conv1": 2}) == cost.macs() - block * 16 * 16 * 6 // 8


def test_a_drop_that_is_no_branch_is_refused(channels: attrim.ChannelMap) -> None:
    with pytest.raises(attrim.errors.InputError, match=r"'layers' is not a residual branch.*layers\.0, layers\.1"):
        channels.cost.macs(drops=["layers"])
