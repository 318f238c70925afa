"""The cost model against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from attrim.core.cost import CostModel, Terms, WidthTable
from attrim.errors import InputError


def ints(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def cost() -> CostModel:
    """A 3x3 convolution 3 -> 8 on 10x10, a 1x1 convolution 8 + 4 -> 6 on 10x10, and a linear layer over 6 x 25 -> 5.

    Groups: "a" (8 channels), "b" (6 channels). Widths: 0: one, 1: a, 2: a + 4 fixed, 3: b, 4: 25 positions of each b.
    """
    widths = WidthTable(
        fixed=ints(1, 0, 4, 0, 0), row=ints(1, 2, 3, 4), group=ints(0, 0, 1, 1), multiplicity=ints(1, 1, 1, 25)
    )
    macs = Terms(coefficient=ints(3 * 9 * 100, 100, 5), factors=ints([1, 0], [2, 3], [4, 0]))
    params = Terms(coefficient=ints(3 * 9, 1, 1, 5, 5), factors=ints([1, 0], [2, 3], [3, 0], [4, 0], [0, 0]))
    return CostModel(("a", "b"), ints(8, 6), widths, macs, params)


def by_hand(a: int, b: int) -> tuple[int, int, int]:
    macs = 27 * 100 * a + 100 * (a + 4) * b + 5 * 25 * b
    params = 27 * a + (a + 4) * b + b + 5 * 25 * b + 5
    return macs, params, a + b


@pytest.mark.parametrize(("a", "b"), [(8, 6), (8, 1), (1, 6), (3, 2), (0, 0)])
def test_costs_equal_the_sums_by_hand(cost: CostModel, a: int, b: int) -> None:
    kept = {"a": a, "b": b}
    assert (cost.macs(kept), cost.params(kept), cost.channels(kept)) == by_hand(a, b)


def test_groups_that_are_not_named_stay_whole(cost: CostModel) -> None:
    assert cost.macs() == by_hand(8, 6)[0]
    assert cost.params({"b": 2}) == by_hand(8, 2)[1]
    assert cost.channels({}) == 14


def test_sequences_and_arrays_follow_the_order_of_groups(cost: CostModel) -> None:
    assert cost.macs([3, 2]) == cost.macs(np.array([3, 2])) == cost.macs({"b": 2, "a": 3})


def test_large_networks_do_not_overflow() -> None:
    widths = WidthTable(fixed=ints(1, 0), row=ints(1), group=ints(0), multiplicity=ints(1))
    terms = Terms(coefficient=ints(1_000_000), factors=ints([1, 1]))
    model = CostModel(("a",), ints(100_000), widths, terms, terms)
    assert model.macs() == 10**16


def test_pricing_does_not_change_the_model(cost: CostModel) -> None:
    cost.macs({"a": 1})
    assert cost.sizes.tolist() == [8, 6]
    assert cost.widths.fixed.tolist() == [1, 0, 4, 0, 0]
    assert cost.macs() == by_hand(8, 6)[0]


def test_unknown_group(cost: CostModel) -> None:
    with pytest.raises(InputError, match=r"unknown group 'c'. The groups are: a, b"):
        cost.macs({"c": 1})


@pytest.mark.parametrize(
    ("kept", "text"), [({"a": 9}, "'a' has 8 channels; keeping 9"), ({"b": -1}, "'b' has 6 channels; keeping -1")]
)
def test_impossible_counts(cost: CostModel, kept: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=text):
        cost.params(kept)


def test_wrong_number_of_counts(cost: CostModel) -> None:
    with pytest.raises(InputError, match=r"expected 2 kept counts, one per group, found shape \(3,\)"):
        cost.macs([1, 2, 3])
