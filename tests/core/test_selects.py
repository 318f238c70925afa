"""Selections as data: the JSON of a plan, joining, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from attrim.core.plan import Cut, PruningPlan
from attrim.core.selection import Selection
from attrim.errors import PlanError


def plan(keep: tuple[int, ...], width: int, **more: Any) -> PruningPlan:
    cut = Cut((4, width, 3, 3), {1: keep})
    return PruningPlan("f", {"a.conv.weight": cut}, selects={"a.conv": Selection(-3, keep)}, **more)


def test_json_round_trip() -> None:
    data = json.loads(json.dumps(plan((0, 2, 5), 8).to_json()))
    assert data["selects"] == {"a.conv": {"dim": -3, "keep": [0, 2, 5]}}
    assert PruningPlan.from_json(data) == plan((0, 2, 5), 8)


def test_a_plan_without_selections_is_written_as_ever() -> None:
    assert "selects" not in PruningPlan("f", {}).to_json()


@pytest.mark.parametrize(
    ("selects", "match"),
    [
        ([], "should map module paths"),
        ({"a.conv": {"dim": -3, "keep": []}}, "at least one position, ascending"),
        ({"a.conv": {"dim": -3, "keep": [2, 1]}}, "at least one position, ascending"),
        ({"a.conv": {"dim": -3, "keep": [-1, 1]}}, "at least one position, ascending"),
        ({"a.conv": {"dim": -3, "keep": [0.5]}}, "at least one position, ascending"),
        ({"a.conv": {"dim": 1, "keep": [0]}}, "'dim' counts from the end"),
        ({"a.conv": {"keep": [0]}}, "dim"),
        ({"b.c.conv": {"dim": -3, "keep": [0]}}, "names 'b.c.conv', which goes with 'drops'"),
    ],
)
def test_malformed_selections_are_refused(selects: Any, match: str) -> None:
    data = {"version": 1, "fingerprint": "f", "cuts": {}, "drops": ["b.c"], "selects": selects}
    with pytest.raises(PlanError, match=match):
        PruningPlan.from_json(data)


def test_a_second_selection_indexes_the_first() -> None:
    joined = plan((1, 2, 5, 7), 8).then(plan((0, 3), 4))
    assert joined.selects["a.conv"].keep == (1, 7)
    assert joined.cuts["a.conv.weight"].keep[1] == (1, 7)


def test_a_selection_from_a_stream_that_was_cut_before() -> None:
    first = PruningPlan("f", {"a.conv.weight": Cut((4, 8, 3, 3), {1: (1, 2, 5, 7)})})
    joined = first.then(plan((0, 3), 4))
    assert joined.selects["a.conv"].keep == (0, 3)
    assert joined.cuts["a.conv.weight"].keep[1] == (1, 7)


def test_a_later_drop_forgets_the_selection() -> None:
    assert plan((0, 1), 8).then(PruningPlan("g", {}, drops=("a",))).selects == {}


def test_a_second_selection_of_what_is_not_there() -> None:
    second = PruningPlan("g", {}, selects={"a.conv": Selection(-3, (0, 9))})
    with pytest.raises(PlanError, match=r"inputs of 'a.conv': the first gives 2 positions of dimension -3"):
        plan((0, 1), 8).then(second)
