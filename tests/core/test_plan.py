"""Plans: JSON there and back, composition against numpy, and the text of every refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attrim.core.plan import AttributeCut, Cut, PruningPlan, write_atomic
from attrim.errors import PlanError


@pytest.fixture
def plan() -> PruningPlan:
    return PruningPlan(
        fingerprint="f0",
        cuts={
            "conv.weight": Cut((4, 3, 3, 3), {0: (0, 2)}),
            "fc.weight": Cut((5, 8), {1: (0, 1, 4, 5), 0: (0, 1, 2, 4)}),
        },
        drops=("layer3.1",),
        attributes={"attention": {"num_heads": AttributeCut(4, 2)}},
        groups={"conv": {"size": 4, "kept": 2}},
        provenance={"criterion": "l2", "macs_before": 1000, "macs_after": 400, "fingerprint_after": "f1"},
    )


def layout(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "version": 1, "fingerprint": "f0", "cuts": {"w": {"shape_before": [4, 3], "keep": {"0": [0, 2]}}}
    }  # fmt: skip
    data.update(changes)
    return {key: value for key, value in data.items() if value is not None}


def test_json_there_and_back(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.cuts["fc.weight"].keep[1] == (0, 1, 4, 5)
    assert again.cuts["fc.weight"].shape_after == (4, 4)
    assert again.attributes["attention"]["num_heads"].after == 2


def test_the_layout_of_the_file(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 1
    assert data["cuts"]["fc.weight"] == {"shape_before": [5, 8], "keep": {"0": [0, 1, 2, 4], "1": [0, 1, 4, 5]}}
    assert data["drops"] == ["layer3.1"]
    assert data["attributes"] == {"attention": {"num_heads": {"before": 4, "after": 2}}}
    assert set(data) == {"version", "fingerprint", "cuts", "drops", "attributes", "groups", "provenance"}


def test_optional_entries_may_be_missing() -> None:
    plan = PruningPlan.from_json(layout())
    assert (plan.drops, plan.attributes, plan.groups, plan.provenance) == ((), {}, {}, {})


def test_saving_makes_the_folder_and_leaves_nothing_else(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "a" / "b" / "plan.json")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["plan.json"]


def test_numbers_that_are_not_json_are_refused_and_the_old_file_stays(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()
    bad = PruningPlan("f0", {}, provenance={"loss": float("nan")})
    with pytest.raises((PlanError, ValueError)):
        bad.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "x", b"old")

    def broken(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk is full"):
        write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan file '.*gone\.json'"):
        PruningPlan.load(tmp_path / "gone.json")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00broken", b"\x80\x81"])
def test_a_binary_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(PlanError, match="cannot read the plan file"):
        PruningPlan.load(tmp_path / "plan.json")


def test_a_truncated_file_names_the_place(plan: PruningPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        PlanError, match=r"is corrupt: not JSON at line \d+, column \d+ .* Make it again with plan.save"
    ):
        PruningPlan.load(path)


def test_a_newer_file_says_how_to_update() -> None:
    with pytest.raises(PlanError, match=r"has version 2, this attrim reads up to 1. Update with: pip install"):
        PruningPlan.from_json(layout(version=2))


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, None, True])
def test_a_version_that_is_no_version(version: object) -> None:
    data = layout()
    data["version"] = version
    with pytest.raises(PlanError, match="expected a version number from 1 to 1, found"):
        PruningPlan.from_json(data)


@pytest.mark.parametrize("data", [[], "plan", 3, None, {}, {"version": 1}, {"cuts": {}}])
def test_json_that_is_no_plan(data: object) -> None:
    with pytest.raises(PlanError, match=r"expected a plan \(a JSON object with 'version' and 'cuts'\), found"):
        PruningPlan.from_json(data)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fingerprint": None}, "malformed: KeyError: 'fingerprint'"),
        ({"cuts": []}, "malformed"),
        ({"cuts": {"w": [1, 2]}}, "malformed"),
        ({"cuts": {"w": {"keep": {}}}}, "malformed: KeyError: 'shape_before'"),
        ({"cuts": {"w": {"shape_before": [4]}}}, "malformed: KeyError: 'keep'"),
        ({"cuts": {"w": {"shape_before": ["x"], "keep": {}}}}, "malformed: ValueError"),
        ({"cuts": {"w": {"shape_before": [4], "keep": {"a": [0]}}}}, "malformed: ValueError"),
        ({"attributes": {"m": {"num_heads": 2}}}, "malformed"),
        ({"attributes": {"m": {"num_heads": {"before": 4}}}}, "malformed: KeyError: 'after'"),
        ({"drops": 3}, "malformed"),
        ({"groups": 3}, "malformed"),
        ({"provenance": [1]}, "malformed"),
    ],
    ids=str,
)  # fmt: skip
def test_malformed_entries(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=f"the plan is {text}"):
        PruningPlan.from_json(layout(**changes))


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ([], r"\[\]"),
        ([0, 4], r"\[0, 4\]"),
        ([-1, 2], r"\[-1, 2\]"),
        ([2, 0], r"\[2, 0\]"),
        ([1, 1], r"\[1, 1\]"),
        ([0.0, 1.0], r"\[0.0, 1.0\]"),
        ([[0], [1]], r"\[\[0\], \[1\]\]"),
        ([True, False], r"\[True, False\]"),
        (["0"], r"\['0'\]"),
        (2, "2"),
        (None, "None"),
    ],
)
def test_kept_indices_that_cannot_be(kept: object, found: str) -> None:
    data = layout(cuts={"w": {"shape_before": [4, 3], "keep": {"0": kept}}})
    expected = rf"'w' dimension 0: expected at least one kept index, ascending, in \[0, 4\), found {found}\."
    with pytest.raises(PlanError, match=expected):
        PruningPlan.from_json(data)


def test_ragged_kept_indices_are_a_plan_error() -> None:
    with pytest.raises(PlanError):
        PruningPlan.from_json(layout(cuts={"w": {"shape_before": [4, 3], "keep": {"0": [[0], [1, 2]]}}}))


@pytest.mark.parametrize("dim", ["2", "-1"])
def test_a_dimension_that_the_tensor_lacks(dim: str) -> None:
    with pytest.raises(PlanError, match=f"'w' has 2 dimensions, the plan cuts dimension {dim}"):
        PruningPlan.from_json(layout(cuts={"w": {"shape_before": [4, 3], "keep": {dim: [0]}}}))


def test_drops_must_be_a_list_of_paths() -> None:
    """A bare string would be read letter by letter."""
    with pytest.raises(PlanError, match="malformed"):
        PruningPlan.from_json(layout(drops="layer3.1"))


# then ----------------------------------------------------------------------------------------------------------------


def cut_array(array: np.ndarray, plan: PruningPlan, name: str) -> np.ndarray:
    if name in plan.cuts:
        for dim, kept in plan.cuts[name].keep.items():
            array = np.take(array, kept, axis=dim)
    return array


@st.composite
def two_plans(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], PruningPlan, PruningPlan]:
    def subset(size: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))))

    def some_cuts(shapes: dict[str, tuple[int, ...]]) -> dict[str, Cut]:
        cuts = {}
        for name, shape in shapes.items():
            dims = draw(st.sets(st.integers(0, len(shape) - 1)))
            if dims:
                cuts[name] = Cut(shape, {d: subset(shape[d]) for d in sorted(dims)})
        return cuts

    sizes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
    shapes = {f"w{i}": draw(sizes) for i in range(draw(st.integers(1, 3)))}
    first = some_cuts(shapes)
    between = {name: first[name].shape_after if name in first else shape for name, shape in shapes.items()}
    return (
        shapes,
        PruningPlan("f0", first, provenance={"fingerprint_after": "f1"}),
        PruningPlan("f1", some_cuts(between), provenance={"fingerprint_after": "f2"}),
    )


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(two_plans())
def test_then_equals_cutting_twice(case: tuple[dict[str, tuple[int, ...]], PruningPlan, PruningPlan]) -> None:
    shapes, first, second = case
    both = PruningPlan.from_json(json.loads(json.dumps(first.then(second).to_json())))
    assert (both.fingerprint, both.provenance["fingerprint_after"]) == ("f0", "f2")
    for name, shape in shapes.items():
        array = np.arange(int(np.prod(shape))).reshape(shape)
        twice = cut_array(cut_array(array, first, name), second, name)
        np.testing.assert_array_equal(cut_array(array, both, name), twice)
        if name in both.cuts:
            assert both.cuts[name].shape_before == shape
            assert both.cuts[name].shape_after == twice.shape


def test_then_is_associative() -> None:
    a = PruningPlan("f0", {"w": Cut((8,), {0: (0, 1, 3, 5, 6, 7)})}, provenance={"fingerprint_after": "f1"})
    b = PruningPlan("f1", {"w": Cut((6,), {0: (1, 2, 4, 5)})}, provenance={"fingerprint_after": "f2"})
    c = PruningPlan("f2", {"w": Cut((4,), {0: (0, 3)})}, provenance={"fingerprint_after": "f3"})
    assert a.then(b).then(c).cuts == a.then(b.then(c)).cuts == {"w": Cut((8,), {0: (1, 7)})}
    assert len(a.then(b).then(c).provenance["steps"]) == len(a.then(b.then(c)).provenance["steps"]) == 3


def test_then_joins_attributes_and_drops() -> None:
    heads = lambda before, after: {"attention": {"num_heads": AttributeCut(before, after)}}  # noqa: E731
    first = PruningPlan("f0", {}, drops=("a",), attributes=heads(8, 4), provenance={"fingerprint_after": "f1"})
    second = PruningPlan("f1", {}, drops=("b",), attributes=heads(4, 3), provenance={"fingerprint_after": "f2"})
    both = first.then(second)
    assert both.drops == ("a", "b")
    assert both.attributes == {"attention": {"num_heads": AttributeCut(8, 3)}}


def test_then_keeps_the_cost_of_the_original() -> None:
    """A composed plan belongs to the original network, so its summary starts there."""
    costs = lambda before, after: {"macs_before": before, "macs_after": after}  # noqa: E731
    first = PruningPlan("f0", {}, provenance={**costs(1000, 500), "fingerprint_after": "f1"})
    second = PruningPlan("f1", {}, provenance={**costs(500, 200), "fingerprint_after": "f2"})
    both = first.then(second)
    assert (both.provenance["macs_before"], both.provenance["macs_after"]) == (1000, 200)
    assert "1,000 ->             200  (20.0 % kept)" in both.summary()


def test_then_keeps_the_width_of_the_original() -> None:
    first = PruningPlan("f0", {}, groups={"a": {"size": 8, "kept": 4}}, provenance={"fingerprint_after": "f1"})
    second = PruningPlan("f1", {}, groups={"a": {"size": 4, "kept": 3}}, provenance={"fingerprint_after": "f2"})
    assert first.then(second).groups == {"a": {"size": 8, "kept": 3}}


def test_then_refuses_a_plan_for_another_network(plan: PruningPlan) -> None:
    other = PruningPlan("f9", {"conv.weight": Cut((4, 3, 3, 3), {0: (1,)})})
    with pytest.raises(
        PlanError,
        match=r"the first leaves 'conv.weight' with shape \(2, 3, 3, 3\), the second was made for \(4, 3, 3, 3\)",
    ):
        plan.then(other)
    with pytest.raises(PlanError, match="leaves a model with fingerprint f1, the second was made for f9"):
        plan.then(PruningPlan("f9", {}))


def test_summary(plan: PruningPlan) -> None:
    assert plan.summary().splitlines() == [
        "macs               1,000 ->             400  (40.0 % kept)",
        "dropped  layer3.1",
        "  conv: 4 -> 2",
    ]
    assert PruningPlan("f0", {"w": Cut((4,), {0: (1,)})}).summary() == "1 tensors cut"
