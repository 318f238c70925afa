"""Stand-ins for removed modules as data: extents, the JSON of a plan, and the price of a removal."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from attrim.core.branches import Branch, Extent, Replacement
from attrim.core.cost import CostModel, Terms, WidthTable
from attrim.core.plan import Cut, PruningPlan, within
from attrim.errors import InputError, PlanError

HALF = Extent(2, ((1, 1, 2),))
ZEROS = Replacement("zeros", (Extent(0), Extent(size=12, channels=True), HALF, Extent(size=7)), (1, 3))


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [
        ((), {1: 1, 9: 9}),
        (((1, 1, 2),), {8: 4, 9: 5, 1: 1}),  # kernel 3, stride 2, padding 1
        (((1, -1, 2), (1, 0, 1)), {9: 4}),  # kernel 3, stride 2; then 1x1
        (((2, 0, 1),), {4: 8}),  # transposed, kernel 2, stride 2
    ],
)
def test_an_extent_follows_its_input(steps: tuple[tuple[int, int, int], ...], lengths: dict[int, int]) -> None:
    assert {n: Extent(2, steps).at(n) for n in lengths} == lengths


def test_json_round_trip() -> None:
    plan = PruningPlan("f", {}, drops=("a", "b", "c"), replacements={"a": ZEROS, "b": Replacement("like")})
    data = json.loads(json.dumps(plan.to_json()))
    assert data["replacements"] == {
        "a": {
            "kind": "zeros",
            "shape": [{"input": 0}, {"channels": 12}, {"input": 2, "steps": [[1, 1, 2]]}, {"size": 7}],
            "returns": [1, 3],
        },
        "b": {"kind": "like"},
    }
    assert PruningPlan.from_json(data) == plan
    assert (ZEROS.width, Replacement().width) == (12, None)


def test_a_plan_without_replacements_is_written_as_ever() -> None:
    assert "replacements" not in PruningPlan("f", {}, drops=("a",)).to_json()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "noise"}, "of the kind identity, like, zeros; found 'noise'"),
        ({"returns": [3, 3]}, "place < length"),
        ({"shape": [{"channels": 0}]}, "at least 1"),
        ({"shape": [{"channels": 3}, {"channels": 3}]}, "at most one dimension of channels"),
        ({"shape": [{"input": -1}]}, "from 0 on"),
        ({"shape": [{"input": 1, "steps": [[1, 0, 0]]}]}, "divides by 1 or more"),
        ({"shape": [{}]}, "malformed"),
        ({"shape": 3}, "malformed"),
    ],
)
def test_damaged_replacements_are_refused(change: dict[str, Any], match: str) -> None:
    data = PruningPlan("f", {}, drops=("a",), replacements={"a": ZEROS}).to_json()
    data = copy.deepcopy(data)
    data["replacements"]["a"].update(change)
    with pytest.raises(PlanError, match=match):
        PruningPlan.from_json(data)


def test_a_replacement_needs_its_drop() -> None:
    data = PruningPlan("f", {}, drops=("a",), replacements={"a": ZEROS}).to_json()
    with pytest.raises(PlanError, match="names 'a', which 'drops' does not"):
        PruningPlan.from_json({**data, "drops": []})


def test_within_goes_by_whole_names() -> None:
    assert within("layer1.0.conv1.weight", ("layer1.0",))
    assert within("layer1.0", ("layer1.0",))
    assert not within("layer1.01.weight", ("layer1.0",))
    assert not within("layer1", ("layer1.0",))


def test_a_later_drop_takes_earlier_cuts_along() -> None:
    cut = Cut((4,), {0: (0, 1)})
    first = PruningPlan(
        "f0",
        {"a.x": cut, "b.x": cut},
        drops=("a.y",),
        replacements={"a.y": ZEROS},
        provenance={"fingerprint_after": "f1"},
    )
    second = PruningPlan("f1", {"a.zeros": cut}, drops=("a",), replacements={"a": ZEROS})
    both = first.then(second)
    assert both.drops == ("a",)
    assert both.replacements == {"a": ZEROS}
    assert set(both.cuts) == {"a.zeros", "b.x"}


# -- price ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cost() -> CostModel:
    """Three terms of one group of 4: outside, in the branch ``outer``, and in ``inner``, which lies inside it."""
    widths = WidthTable(*(np.array(a) for a in ([1, 0], [1], [0], [1])))
    terms = Terms(np.array([1, 10, 100]), np.array([[1], [1], [1]]), np.array([-1, 0, 1]))
    return CostModel(("g",), np.array([4]), widths, terms, terms, ("outer", "inner"), np.array([-1, 0]), np.array([-1]))


@pytest.mark.parametrize(
    ("drops", "price"), [((), 444), (("inner",), 44), (("outer",), 4), (("inner", "outer"), 4), ("outer", 4)]
)
def test_terms_go_with_their_branch(cost: CostModel, drops: Any, price: int) -> None:
    assert cost.macs(drops=drops) == cost.params(None, drops) == price
    assert cost.macs({"g": 2}, drops) == price // 2
    assert cost.channels(drops=drops) == 4


def test_the_group_of_a_branch_counts_nothing(cost: CostModel) -> None:
    inner = CostModel(
        cost.groups,
        cost.sizes,
        cost.widths,
        cost.mac_terms,
        cost.param_terms,
        cost.branches,
        cost.inside,
        np.array([1]),
    )
    assert inner.channels(drops=["outer"]) == inner.channels({"g": 2}, ["inner"]) == 0
    assert inner.macs({"g": 2}, ["inner"]) == 44  # a cut inside of what goes is not carried out


def test_an_unknown_branch_is_named(cost: CostModel) -> None:
    with pytest.raises(
        InputError, match=r"'g' is not a residual branch that can be removed. The branches are: outer, inner"
    ):
        cost.macs(drops=["g"])


def test_a_branch_prints_what_matters() -> None:
    branch = Branch("b", "b", ("b.x",), "computed", "b.x", ("b.x.weight",), {"b.x": ZEROS}, inside="c")
    assert repr(branch) == "Branch('b', 1 modules, 1 tensors, shortcut computed, gate 'b.x', inside 'c')"
    assert branch.exact
