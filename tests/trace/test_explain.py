"""What a channel map says to people: explain, table, repr."""

from __future__ import annotations

import pytest

import attrim
from attrim import ChannelMap
from attrim.errors import InputError
from nets import Attention, Plain, Residual, filled, image


@pytest.fixture(scope="module")
def plain() -> ChannelMap:
    return attrim.trace(filled(Plain()), image())


@pytest.fixture(scope="module")
def attention() -> ChannelMap:
    return attrim.trace(filled(Attention()), image(2, 7, 12))


def test_explain_names_group_role_and_exactness_for_every_dimension(plain: ChannelMap) -> None:
    assert plain.explain("conv2.weight").splitlines() == [
        "conv2.weight (12, 8, 3, 3)",
        "  dim 0 (12): group 'conv2', 12 channels as out, exact",
        "  dim 1 (8): group 'conv1', 8 channels as in, exact",
        "  dim 2 (3): not a channel axis",
        "  dim 3 (3): not a channel axis",
    ]


@pytest.mark.parametrize(
    ("name", "role"),
    [("bn1.weight", "scale"), ("bn1.bias", "shift"), ("bn1.running_mean", "state"), ("bn1.running_var", "state")],
)
def test_explain_knows_the_roles_of_a_norm(plain: ChannelMap, name: str, role: str) -> None:
    assert plain.explain(f"{name}:0") == f"{name} (8,)\n  dim 0 (8): group 'conv1', 8 channels as {role}, exact"


def test_explain_gives_the_reason_and_the_line_of_what_is_pinned(plain: ChannelMap) -> None:
    assert plain.explain("head.weight:0") == "head.weight (5, 12)\n  dim 0 (5): all pinned: is an output of the network"
    text = plain.explain("conv1.weight:1")
    assert "dim 1 (3): all pinned: contracted with an axis that does not follow the cut (aten.convolution" in text
    assert "in module 'conv1', at " in text
    assert "nets.py:" in text


def test_explain_tells_of_effects_and_of_several_positions_a_channel(attention: ChannelMap) -> None:
    assert "group 'embed', 20 channels as scale, inexact: layer norm statistics" in attention.explain("norm.weight")
    assert "dim 0 (72): group 'qkv', 4 channels as out, 18 positions a channel, exact" in attention.explain(
        "qkv.weight"
    )


def test_explain_of_a_tensor_without_channels_says_so(plain: ChannelMap) -> None:
    assert plain.explain("bn1.num_batches_tracked") == "bn1.num_batches_tracked ()"


def test_explain_refuses_unknown_names_and_helps(plain: ChannelMap) -> None:
    with pytest.raises(
        InputError, match=r"no parameter or buffer is named 'conv1\.wieght'. Did you mean conv1\.weight"
    ):
        plain.explain("conv1.wieght")
    for wrong in ("conv1.weight:4", "conv1.weight:-1", "conv1.weight:", "conv1.weight:first"):
        with pytest.raises(InputError, match=r"'conv1\.weight' has the dimensions 0 … 3; found ':"):
            plain.explain(wrong)


def test_the_table_has_a_line_for_every_group_and_every_pin(attention: ChannelMap) -> None:
    lines = attention.table().splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["group", "channels", "axes", "exact"],
        ["embed", "20", "8", "no:", "layer", "norm", "statistics"],
        ["qkv", "4", "3", "yes"],
    ]
    assert lines[3:5] == ["", "pinned:"]
    assert [line.split(":")[0].strip() for line in lines[5:8]] == ["embed.weight", "head.weight", "head.bias"]
    assert lines[8:10] == ["", "branches that can be removed whole:"]
    assert [line.split(":")[0].strip() for line in lines[10:]] == ["qkv"]
    assert "head.weight:0 (5 of 5): is an output of the network" in lines[6]


def test_the_repr_counts(plain: ChannelMap) -> None:
    assert repr(plain) == "ChannelMap(2 groups, 20 channels, 3 pinned axes, 138,360 MACs, 1,197 parameters)"
    assert repr(plain["conv1"]) == (
        "ChannelGroup('conv1', size=8, conv1.weight:0[out], bn1.weight:0[scale], bn1.bias:0[shift], conv2.weight:1[in], … 2 more)"
    )


def test_an_unknown_group_is_refused_with_the_known_ones(plain: ChannelMap) -> None:
    with pytest.raises(InputError, match=r"unknown group 'conv9'. The groups are: conv1, conv2"):
        plain["conv9"]


def test_groups_are_in_network_order_and_named_after_their_producer() -> None:
    channels = attrim.trace(filled(Residual((8, 16), blocks=2)), image(1, 3, 8, 8))
    assert list(channels.groups) == [
        "conv1", "layers.0.conv1", "layers.1.conv1", "layers.2.conv1", "layers.2.conv2", "layers.3.conv1",
    ]  # fmt: skip
    axes = {str(m.axis): m.role for m in channels["conv1"].members}
    assert axes["layers.0.conv2.weight:0"] == "out"  # the residual sum ties the whole stage
    assert axes["layers.2.down.0.weight:1"] == "in"
    assert axes["layers.1.bn2.running_var:0"] == "state"


def test_groups_of_equal_structure_are_of_one_kind() -> None:
    channels = attrim.trace(filled(Residual((8, 16), blocks=2)), image(1, 3, 8, 8))
    kinds = {g.id: g.kind for g in channels}
    assert kinds["layers.0.conv1"] == kinds["layers.1.conv1"] == kinds["layers.3.conv1"]
    assert kinds["conv1"] != kinds["layers.0.conv1"]
    assert kinds["conv1"] != kinds["layers.2.conv2"]


def test_taps_show_where_the_channels_can_be_watched(plain: ChannelMap, attention: ChannelMap) -> None:
    assert [(t.module, t.dim, t.kind) for t in plain["conv1"].taps] == [("conv1", 1, "conv"), ("bn1", 1, "norm")]
    assert [(t.module, t.dim, t.kind) for t in plain["conv2"].taps] == [("conv2", 1, "conv"), ("bn2", 1, "norm")]
    assert plain["conv1"].taps[0].index.tolist() == [[c] for c in range(8)]
    tap = next(t for t in attention["qkv"].taps if t.module == "qkv")
    assert (tap.dim, tap.kind, tap.index.shape) == (2, "linear", (4, 18))
    assert tap.index[1].tolist() == [part * 24 + 6 + d for part in range(3) for d in range(6)]
