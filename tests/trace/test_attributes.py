"""Numbers in modules that follow a cut: head counts, block counts, widths read from attributes and from tuples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.core.channels import AttributeRule
from nets import Attention, filled, image


class Heads(nn.Module):
    """Attention written out, the number of heads under a name of choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, 3)
        self.query, self.key, self.value, self.out = (nn.Linear(a, b) for a, b in ((8, 12), (8, 12), (8, 15), (15, 4)))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = getattr(self, self.name)
        q, k, v = (f(x).view(batch, tokens, heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class StatedWidth(nn.Module):
    """A view to a width that the constructor remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.side = 6, 4
        self.project, self.conv = nn.Linear(5, 6 * 16), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.project(x).view(-1, self.width, self.side, self.side).relu())


class StatedSplit(nn.Module):
    """A split into sizes from a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (3, 5)
        self.stem = nn.Conv2d(3, 8, 1)
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().split(self.sizes, dim=1)
        return self.left(left) + self.right(right)


class Shuffled(nn.Module):
    """Channel shuffle with the number of groups in an attribute or in the code, behind a plain or grouped convolution."""

    def __init__(self, stated: bool, groups: int) -> None:
        super().__init__()
        self.stated = stated
        if stated:
            self.groups = 3
        self.stem, self.body = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=groups)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu())
        b, c, h, w = x.shape
        groups = self.groups if self.stated else 3
        return self.head(x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w))


def proved(model: nn.Module, example: Tensor, kept: dict[str, list[int]]) -> nn.Module:
    """Cut, proved, and returned."""
    channels = attrim.trace(model, example)
    plan = attrim.plan_from_kept(channels, kept)
    small = attrim.apply(model, plan)
    check = attrim.verify(model, small, plan, example)
    assert check.ok, str(check)
    assert check.exact_error < 1e-12
    return small


@pytest.mark.parametrize("name", ["num_heads", "n_heads", "nhead", "heads", "num_attention_heads"])
def test_a_head_count_follows_under_its_usual_names(name: str) -> None:
    model, example = filled(Heads(name)), image(2, 5, 8)
    channels = attrim.trace(model, example)
    assert {g.id: (g.size, [m.index.shape[1] for m in g.members]) for g in channels} == {
        "query": (3, [4, 4, 4, 4, 5, 5, 5])
    }
    assert channels.attributes == (AttributeRule("", name, 3, 0, (("query", 1),)),)
    small = proved(model, example, {"query": [0, 2]})
    assert getattr(small, name) == 2
    assert getattr(model, name) == 3
    assert small.query.weight.shape == (8, 8)
    assert torch.equal(small.value.bias, model.value.bias[[0, 1, 2, 3, 4, 10, 11, 12, 13, 14]])


def test_whole_heads_of_a_fused_projection() -> None:
    model = filled(Attention())
    small = proved(model, image(2, 7, 12), {"qkv": [1, 3]})
    assert (small.num_heads, small.head_dim) == (2, 6)
    rows = [part * 24 + head * 6 + d for part in range(3) for head in (1, 3) for d in range(6)]
    assert torch.equal(small.qkv.weight, model.qkv.weight[rows])
    assert torch.equal(small.proj.weight, model.proj.weight[:, [*range(6, 12), *range(18, 24)]])


def test_a_width_that_a_view_reads_follows() -> None:
    model = filled(StatedWidth())
    channels = attrim.trace(model, image(2, 5))
    assert channels.attributes == (AttributeRule("", "width", 6, 0, (("project", 1),)),)
    small = proved(model, image(2, 5), {"project": [0, 4, 5]})
    assert (small.width, small.side, small.project.out_features, small.conv.in_channels) == (3, 4, 48, 3)


def test_an_entry_of_a_tuple_follows() -> None:
    model = filled(StatedSplit())
    channels = attrim.trace(model, image())
    rules = {(r.attribute, r.before): r.per_channel for r in channels.attributes}
    assert set(rules) == {("sizes[0]", 3), ("sizes[1]", 5)}
    first, second = rules["sizes[0]", 3][0][0], rules["sizes[1]", 5][0][0]
    small = proved(model, image(), {first: [1, 2], second: [0, 1, 4]})
    assert small.sizes == (2, 3)
    assert model.sizes == (3, 5)
    assert (small.stem.out_channels, small.left.in_channels, small.right.in_channels) == (5, 2, 3)


def test_a_shuffle_loses_whole_blocks_where_their_number_can_follow() -> None:
    model = filled(Shuffled(stated=True, groups=1))
    channels = attrim.trace(model, image())
    assert channels["body"].members[0].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert channels.attributes == (AttributeRule("", "groups", 3, 0, (("body", 1),)),)
    small = proved(model, image(), {"stem": [2, 4, 7], "body": [0, 2]})
    assert (small.groups, small.body.out_channels, small.head.in_channels) == (2, 8, 8)


@pytest.mark.parametrize("stated", [False, True], ids=["constant", "attribute"])
def test_a_shuffle_behind_a_grouped_convolution_keeps_its_places(stated: bool) -> None:
    model = filled(Shuffled(stated, groups=3))
    channels = attrim.trace(model, image())
    assert {g.id: (g.size, g.members[0].index.tolist()[1]) for g in channels} == {
        "stem": (4, [1, 5, 9]),
        "body": (4, [1, 5, 9]),
    }
    small = proved(model, image(), {"stem": [0, 1, 3], "body": [1, 2]})
    assert (small.body.groups, small.body.in_channels, small.body.out_channels) == (3, 9, 6)


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: torch.cat([x[:, :4] * 2, x[:, 4:]], 1),
    "view": lambda x: x.view(x.shape[0], 8, -1).view(x.shape),
    "heads": lambda x: x.view(x.shape[0], 4, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
}


class Constant(nn.Module):
    """A number in the code that nothing can repair."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(CONSTANTS[self.name](self.before(x)))


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_size_written_as_a_constant_pins_what_it_has_to(name: str) -> None:
    model, example = filled(Constant(name)), image()
    channels = attrim.trace(model, example)
    assert channels.attributes == ()
    pinned = {str(p.axis): (len(p.positions), str(p.reason)) for p in channels.pinned}
    count, reason = pinned["before.weight:0"]
    assert "test_attributes.py:" in reason
    if name == "slice":  # only the part before the constant has to stay
        assert (count, [(g.id, g.size) for g in channels]) == (4, [("before", 4)])
        assert proved(model, example, {"before": [3]}).after.in_channels == 5
    else:
        assert (count, len(channels)) == (8, 0)
