"""Code that goes wrong only once a width has changed: caught with the line, or in numbers where labels see nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import Verification
from attrim.core.plan import Cut, PruningPlan
from attrim.modules.names import fingerprint, named_tensors
from nets import filled, image


class Around(nn.Module):
    """A convolution, some code on its eight channels, and another convolution."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code
        self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.code(self.before(x).relu()))


def cut_by_hand(model: nn.Module, kept: tuple[int, ...], columns: tuple[int, ...] = ()) -> PruningPlan:
    """What a tool that believes in the layers alone would do: rows of one, the same columns of the other."""
    cuts = {
        "before.weight": Cut((8, 3, 1, 1), {0: kept}),
        "before.bias": Cut((8,), {0: kept}),
        "after.weight": Cut((2, 8, 1, 1), {1: columns or kept}),
    }
    return PruningPlan(fingerprint(named_tensors(model).shapes), cuts)


def proved(code: Callable[[Tensor], Tensor], kept: tuple[int, ...], columns: tuple[int, ...] = ()) -> Verification:
    model = filled(Around(code))
    plan = cut_by_hand(model, kept, columns)
    return attrim.verify(model, attrim.apply(model, plan), plan, image())


def lines(check: Verification) -> set[int]:
    """The lines of this file that conflicts name."""
    sources = [c.reason.source.rsplit(":", 1) for c in check.conflicts if "test_wrong_code.py:" in c.reason.source]
    return {int(line) for _, line in sources}


def shuffle(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def in_blocks_of_four(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, 4, *x.shape[2:]).flip(1).reshape(x.shape)


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([a * b.sigmoid(), b], 1)


def rolled_when_narrow(x: Tensor) -> Tensor:
    return x if x.shape[1] > 4 else x.roll(1, dims=1)


def summed_when_narrow(x: Tensor) -> Tensor:
    return x if x.shape[1] > 4 else x.cumsum(1)


def doubled_when_narrow(x: Tensor) -> Tensor:
    return x if x.shape[1] > 4 else x * 2


RESHUFFLES = {
    "view that reshuffles": (shuffle, (0, 1, 2, 5)),
    "view in constant blocks": (in_blocks_of_four, (0, 1, 4, 5)),
    "chunk in the wrong place": (halves, (0, 1, 2, 4)),
}


@pytest.mark.parametrize(("code", "kept"), RESHUFFLES.values(), ids=RESHUFFLES)
def test_code_that_reshuffles_silently_runs_and_is_caught_with_its_line(
    code: Callable[[Tensor], Tensor], kept: tuple[int, ...]
) -> None:
    model = filled(Around(code))
    small = attrim.apply(model, cut_by_hand(model, kept))
    assert small(image()).shape == model(image()).shape  # nothing in PyTorch complains
    check = proved(code, kept)
    assert not check.ok
    source, first = inspect.getsourcelines(code)
    own = set(range(first, first + len(source)))
    own.add(inspect.getsourcelines(Around.forward)[1] + 1)  # or where the channels meet again
    assert lines(check) & own
    assert any("before.weight:0[" in str(c) for c in check.conflicts)


def test_the_same_code_cut_along_its_structure_is_fine() -> None:
    assert proved(shuffle, (1, 2, 5, 6), (2, 3, 4, 5)).max_error < 1e-12
    assert proved(halves, (0, 3, 4, 7)).max_error < 1e-12


def test_a_roll_that_starts_below_a_width_meets_the_wrong_weights() -> None:
    assert proved(rolled_when_narrow, (0, 1, 2, 3, 6)).ok
    check = proved(rolled_when_narrow, (0, 2, 6))
    assert not check.ok
    mixed = [c.reason for c in check.conflicts if c.reason.text == "combines positions of different channels"]
    assert [(r.operator, r.module) for r in mixed] == [("aten.convolution", "after")]
    assert any("rolled by a constant" in c.reason.text for c in check.conflicts)
    assert check.max_error == float("inf")


def test_an_operator_that_depends_on_position_is_named_where_it_stands() -> None:
    check = proved(summed_when_narrow, (0, 2, 6))
    assert not check.ok
    assert check.conflicts[0].reason.text == "cumsum along the channel axis depends on position"
    assert inspect.getsourcelines(summed_when_narrow)[1] + 1 in lines(check)


def test_a_number_that_changes_below_a_width_is_caught_in_numbers() -> None:
    check = proved(doubled_when_narrow, (0, 2, 6))
    assert (check.ok, check.exact, check.conflicts) == (False, True, ())
    assert 0.1 < check.max_error < 2


def test_code_that_no_longer_runs_is_reported_with_the_error_and_the_line() -> None:
    def eight(x: Tensor) -> Tensor:
        return x.view(x.shape[0], 8, 64).view(x.shape)

    check = proved(eight, (0, 1, 2))
    assert not check.ok
    assert any("shape '[2, 8, 64]' is invalid for input of size 384" in str(c) for c in check.conflicts)
    assert inspect.getsourcelines(eight)[1] + 1 in lines(check)


class Inexact(nn.Module):
    """A layer norm (inexact), then two exact layers of which one goes wrong when narrow."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code
        self.first, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self.second(self.norm(self.first(x)))).relu())


@pytest.mark.parametrize(("code", "ok"), [(lambda x: x, True), (doubled_when_narrow, False)], ids=["good", "doubled"])
def test_beside_an_inexact_group_the_exact_part_is_judged(code: Any, ok: bool) -> None:
    model, example = filled(Inexact(code)), image(6, 5)
    channels = attrim.trace(model, example)
    assert {g.id: g.effects for g in channels} == {"first": ("layer norm statistics",), "second": ()}
    plan = attrim.plan_from_kept(channels, {"first": [0, 1, 2, 3, 4], "second": [1, 4, 5]})
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact, check.effects) == (ok, False, {"layer norm statistics": ("first.weight:0",)})
    assert (check.exact_error < 1e-12) is ok
    exact_only = attrim.plan_from_kept(channels, {"second": [1, 4, 5]})
    assert attrim.verify(model, attrim.apply(model, exact_only), exact_only, example).ok is ok


def test_provenance_and_groups_of_a_plan_are_not_believed() -> None:
    model = filled(Around(rolled_when_narrow))
    plan = replace(cut_by_hand(model, (0, 2, 6)), provenance={"verified": True}, groups={"before": {"exact": True}})
    assert not attrim.verify(model, attrim.apply(model, plan), plan, image()).ok
