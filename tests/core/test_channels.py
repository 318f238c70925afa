"""The channel map as people read it: explain, table, repr."""

from __future__ import annotations

import numpy as np
import pytest

from attrim.core.axes import Axis
from attrim.core.channels import ChannelGroup, ChannelMap, Member, PinnedAxis, Reason
from attrim.core.cost import CostModel, Terms, WidthTable
from attrim.errors import InputError


def column(*positions: int) -> np.ndarray:
    return np.array(positions, dtype=np.int64)[:, None]


@pytest.fixture
def channels() -> ChannelMap:
    """conv (3 -> 4), norm, fc over two positions of each channel (8 -> 2); the classes are pinned."""
    conv = ChannelGroup(
        "conv",
        4,
        (
            Member(Axis("conv.weight", 0), column(0, 1, 2, 3), "out"),
            Member(Axis("norm.weight", 0), column(0, 1, 2, 3), "scale"),
            Member(Axis("norm.bias", 0), column(0, 1, 2, 3), "shift"),
            Member(Axis("norm.running_mean", 0), column(0, 1, 2, 3), "state"),
            Member(Axis("fc.weight", 1), np.arange(8).reshape(4, 2), "in"),
        ),
        effects=("layer norm statistics",),
    )
    output = Reason("output of the network", "aten.addmm", "fc", "net.py:12")
    one = np.array([1], dtype=np.int64)
    none = np.array([], dtype=np.int64)
    terms = Terms(one, np.array([[1, 0]]))
    cost = CostModel(
        ("conv",), np.array([4]), WidthTable(np.array([1, 0]), one, np.zeros(1, np.int64), one), terms, terms
    )
    shapes = {
        "conv.weight": (4, 3, 1, 1),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "norm.running_mean": (4,),
        "fc.weight": (2, 8),
    }
    pins = (
        PinnedAxis(Axis("fc.weight", 0), np.arange(2), 2, output),
        PinnedAxis(Axis("conv.weight", 1), none, 3, Reason("input")),
    )
    return ChannelMap({"conv": conv}, pins, cost, "abc", shapes, aliases={"head.weight": "fc.weight"})


def test_axes_print_as_globs_are_written() -> None:
    assert str(Axis("layer1.0.conv2.weight", 0)) == "layer1.0.conv2.weight:0"
    assert sorted([Axis("b", 0), Axis("a", 1), Axis("a", 0)]) == [Axis("a", 0), Axis("a", 1), Axis("b", 0)]


def test_roles_select_members(channels: ChannelMap) -> None:
    group = channels["conv"]
    assert [str(m.axis) for m in group.with_role("in")] == ["fc.weight:1"]
    assert [str(m.axis) for m in group.with_role("shift", "scale")] == ["norm.weight:0", "norm.bias:0"]
    assert group.with_role("param") == ()


def test_a_group_with_effects_is_not_exact(channels: ChannelMap) -> None:
    assert not channels["conv"].exact
    assert ChannelGroup("x", 1, ()).exact


def test_explain_names_group_role_and_reason(channels: ChannelMap) -> None:
    text = channels.explain("fc.weight")
    assert text.splitlines()[0] == "fc.weight (2, 8)"
    assert "dim 0 (2): all pinned: output of the network (aten.addmm, in module 'fc', at net.py:12)" in text
    assert "dim 1 (8): group 'conv', 4 channels as in, 2 positions a channel, inexact: layer norm statistics" in text


def test_explain_one_axis(channels: ChannelMap) -> None:
    assert "dim 0" not in channels.explain("fc.weight:1")


def test_explain_follows_ties(channels: ChannelMap) -> None:
    assert channels.explain("head.weight") == channels.explain("fc.weight")


def test_explain_an_axis_without_channels(channels: ChannelMap) -> None:
    assert "dim 2 (1): not a channel axis" in channels.explain("conv.weight")


def test_explain_an_unknown_tensor_suggests_close_names(channels: ChannelMap) -> None:
    with pytest.raises(InputError, match=r"no parameter or buffer is named 'conv.wieght'. Did you mean .*conv.weight"):
        channels.explain("conv.wieght")


@pytest.mark.parametrize("dim", ["first", "7", "-1", ""])
def test_explain_an_unknown_dimension(channels: ChannelMap, dim: str) -> None:
    """``name:`` with a dimension that the tensor lacks is an error like any other, not a bare header."""
    with pytest.raises(InputError, match=r"conv\.weight"):
        channels.explain(f"conv.weight:{dim}")


def test_unknown_group(channels: ChannelMap) -> None:
    with pytest.raises(InputError, match=r"unknown group 'cnv'. The groups are: conv"):
        channels["cnv"]


def test_table_and_repr(channels: ChannelMap) -> None:
    lines = channels.table().splitlines()
    assert lines[0].split() == ["group", "channels", "axes", "exact"]
    assert lines[1].split(maxsplit=3) == ["conv", "4", "5", "no: layer norm statistics"]
    assert "  fc.weight:0 (2 of 2): output of the network (aten.addmm, in module 'fc', at net.py:12)" in lines
    assert repr(channels) == "ChannelMap(1 groups, 4 channels, 2 pinned axes, 4 MACs, 4 parameters)"
    assert repr(channels["conv"]).startswith("ChannelGroup('conv', size=4, conv.weight:0[out], ")
    assert "… 1 more, inexact: layer norm statistics" in repr(channels["conv"])


def test_a_map_iterates_over_its_groups(channels: ChannelMap) -> None:
    assert [g.id for g in channels] == ["conv"]
    assert len(channels) == 1


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (Reason("gone"), "gone"),
        (Reason("gone", "aten.roll"), "gone (aten.roll)"),
        (Reason("gone", "aten.roll", "a.b", "x.py:3"), "gone (aten.roll, in module 'a.b', at x.py:3)"),
    ],
)
def test_reasons_print_what_is_known(reason: Reason, text: str) -> None:
    assert str(reason) == text
