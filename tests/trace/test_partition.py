"""Units to groups: what touches the same axes in the same way belongs together, in the order of the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attrim.core.axes import Axis
from attrim.core.channels import Reason
from attrim.trace.labels import LabelSpace, Recorder
from attrim.trace.partition import Partition, partition
from attrim.trace.solve import solve


class Board:
    """A label space and a book, with axes by name."""

    def __init__(self, **sizes: int) -> None:
        self.space, self.book = LabelSpace(), Recorder()
        self.axis = {name: self.space.add(Axis(name, 0), n) for name, n in sizes.items()}

    def tie(self, a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> None:
        self.book.tie(np.asarray(a), np.asarray(b), Reason("meet"))

    def parts(self) -> Partition:
        return partition(self.space, solve(self.book, self.space.total), self.book)

    def groups(self) -> dict[str, list[int]]:
        """Axis -> the group of each position."""
        parts = self.parts()
        return {name: parts.group_of[labels].tolist() for name, labels in self.axis.items()}

    def channels(self) -> dict[str, list[int]]:
        """Axis -> the channel of each position within its group."""
        parts = self.parts()
        return {name: parts.channel_of[labels].tolist() for name, labels in self.axis.items()}


def test_tied_axes_form_one_group_and_others_their_own() -> None:
    board = Board(a=3, b=3, c=2)
    board.tie(board.axis["a"], board.axis["b"])
    parts = board.parts()
    assert parts.sizes.tolist() == [3, 2]
    assert board.groups() == {"a": [0, 0, 0], "b": [0, 0, 0], "c": [1, 1]}
    assert board.channels() == {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1]}


def test_channels_follow_the_first_axis_even_where_a_later_one_is_permuted() -> None:
    board = Board(a=4, b=4)
    board.tie(board.axis["a"], board.axis["b"][[2, 0, 3, 1]])
    assert board.channels() == {"a": [0, 1, 2, 3], "b": [1, 3, 0, 2]}


def test_a_concatenation_gives_one_group_for_each_source() -> None:
    board = Board(a=3, b=2, joined=5)
    board.tie(np.concatenate([board.axis["a"], board.axis["b"]]), board.axis["joined"])
    assert board.groups() == {"a": [0, 0, 0], "b": [1, 1], "joined": [0, 0, 0, 1, 1]}
    assert board.channels()["joined"] == [0, 1, 2, 0, 1]


def test_positions_tied_among_themselves_are_one_channel_with_several_positions() -> None:
    board = Board(a=6)
    board.tie(board.axis["a"][:3], board.axis["a"][3:])
    assert board.parts().sizes.tolist() == [3]
    assert board.channels() == {"a": [0, 1, 2, 0, 1, 2]}


def test_units_with_another_number_of_positions_are_another_group() -> None:
    board = Board(a=6)
    board.tie(board.axis["a"][[0, 2]], board.axis["a"][[1, 3]])
    assert board.groups() == {"a": [0, 0, 0, 0, 1, 1]}
    assert board.channels() == {"a": [0, 0, 1, 1, 0, 1]}


def test_an_effect_on_some_channels_splits_the_group_and_stays_with_them() -> None:
    board = Board(a=5)
    board.book.effect(board.axis["a"][3:], "layer norm statistics")
    board.book.effect(board.axis["a"][4:], "attention scale")
    board.book.effect(board.axis["a"][3:4], "attention scale")
    parts = board.parts()
    assert parts.sizes.tolist() == [3, 2]
    assert parts.effects == [(), ("attention scale", "layer norm statistics")]


def test_channels_that_are_counted_in_a_product_of_their_own_are_kept_apart() -> None:
    board = Board(a=6)
    board.book.cost(7, (board.axis["a"][[0, 1, 2, 5]],))
    assert board.groups() == {"a": [0, 0, 0, 1, 1, 0]}


def test_pinned_positions_belong_to_no_group() -> None:
    board = Board(a=4, b=4)
    board.tie(board.axis["a"], board.axis["b"])
    board.book.pin(board.axis["b"][1:2], Reason("an output"))
    assert board.groups() == {"a": [0, -1, 0, 0], "b": [0, -1, 0, 0]}
    assert board.channels()["b"] == [0, 0, 1, 2]
    assert board.parts().sizes.tolist() == [3]


def test_a_single_channel_of_its_kind_stays_and_is_named_lonely() -> None:
    board = Board(a=3, b=2)
    board.tie(board.axis["a"][:1], board.axis["b"][:1])
    parts = board.parts()
    assert board.groups() == {"a": [-1, 0, 0], "b": [-1, -1]}
    assert parts.lonely.tolist() == [*board.axis["a"][:1], *board.axis["b"]]
    assert parts.units[parts.lonely].tolist() == [0, 0, 0]


def test_all_pinned_leaves_no_group() -> None:
    board = Board(a=2)
    board.book.pin(board.axis["a"], Reason("an output"))
    parts = board.parts()
    assert parts.sizes.tolist() == []
    assert parts.group_of.tolist() == [-1, -1, -1]
    assert parts.effects == []
