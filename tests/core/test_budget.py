"""Budgets: what is accepted, and the text of every refusal."""

from __future__ import annotations

import math
import re

import pytest

from attrim.core.budget import Budget
from attrim.errors import AttrimError, BudgetError


def test_defaults_protect_every_layer() -> None:
    budget = Budget(macs=0.5)
    assert (budget.min_keep, budget.multiple_of, budget.max_removed, budget.frozen, budget.scope) == (
        0.1, 1, 1.0, (), "global",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["macs", "params", "channels"])
@pytest.mark.parametrize("value", [1, 1.0, 0.5, 1e-6])
def test_fractions_in_range(name: str, value: float) -> None:
    assert getattr(Budget(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["macs", "params", "channels"])
@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.2, math.nan, math.inf, True, "0.5", [0.5]])
def test_fractions_out_of_range(name: str, value: object) -> None:
    expected = re.escape(f"{name}: expected the fraction that is kept, in (0, 1], found {value!r}.")
    with pytest.raises(BudgetError, match=expected) as caught:
        Budget(**{name: value})  # type: ignore[arg-type]
    assert f"For example Budget({name}=0.5) keeps half." in str(caught.value)
    assert isinstance(caught.value, AttrimError)
    assert isinstance(caught.value, ValueError)


def test_a_percentage_is_recognised() -> None:
    with pytest.raises(BudgetError, match=re.escape("50 looks like a percentage; write macs=0.5.")):
        Budget(macs=50)


def test_a_budget_without_a_limit() -> None:
    with pytest.raises(BudgetError, match="needs at least one limit: macs, params or channels"):
        Budget(min_keep=4)


def test_latency_is_refused_until_it_is_measured() -> None:
    with pytest.raises(BudgetError, match="latency_ms: a latency budget is not implemented yet") as caught:
        Budget(macs=0.5, latency_ms=3.0)
    assert "macs=" in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 0.0, -0.1, True, math.nan, math.inf, "4"])
def test_min_keep_must_be_positive(value: object) -> None:
    expected = f"min_keep: expected a positive int (channels) or a float in (0, 1], found {value!r}."
    with pytest.raises(BudgetError, match=re.escape(expected)):
        Budget(macs=0.5, min_keep=value)  # type: ignore[arg-type]


def test_min_keep_as_a_float_above_one() -> None:
    with pytest.raises(
        BudgetError, match=re.escape("a float is a fraction in (0, 1], found 7.5. For channels write min_keep=8.")
    ):
        Budget(macs=0.5, min_keep=7.5)


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "half"])
def test_max_removed_is_a_fraction(value: object) -> None:
    with pytest.raises(BudgetError, match=re.escape(f"max_removed: expected a fraction in [0, 1], found {value!r}.")):
        Budget(macs=0.5, max_removed=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -8, 8.0, True, "8"])
def test_multiple_of_is_a_positive_int(value: object) -> None:
    with pytest.raises(BudgetError, match=re.escape(f"multiple_of: expected an int >= 1, found {value!r}.")):
        Budget(macs=0.5, multiple_of=value)  # type: ignore[arg-type]


def test_frozen_must_be_a_tuple_of_globs() -> None:
    with pytest.raises(BudgetError, match=re.escape("Write frozen=('conv1.*',).")):
        Budget(macs=0.5, frozen="conv1.*")  # type: ignore[arg-type]
    assert Budget(macs=0.5, frozen=["conv1.*", "fc.*"]).frozen == ("conv1.*", "fc.*")  # type: ignore[arg-type]


def test_unknown_scope_lists_the_known_ones() -> None:
    with pytest.raises(BudgetError, match=r"scope: expected one of global, group, isomorphic, found 'layer'."):
        Budget(macs=0.5, scope="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("min_keep", "max_removed", "size", "floor"),
    [
        (0.1, 1.0, 64, 7),  # a tenth, rounded up
        (0.1, 1.0, 10, 1),  # exactly one: 0.1 * 10 must not round up to 2
        (0.1, 1.0, 1, 1),
        (0.3, 1.0, 10, 3),  # 0.3 * 10 is a little above 3 in floating point
        (8, 1.0, 64, 8),
        (8, 1.0, 5, 5),  # never more than there is
        (1, 1.0, 64, 1),
        (1.0, 1.0, 64, 64),  # a float 1.0 is the whole group, an int 1 one channel
        (1, 0.75, 64, 16),  # the stricter of the two holds
        (32, 0.75, 64, 32),
        (1, 0.0, 64, 64),
        (1, 0.9, 10, 1),
    ],
)  # fmt: skip
def test_floor(min_keep: float, max_removed: float, size: int, floor: int) -> None:
    assert Budget(macs=0.5, min_keep=min_keep, max_removed=max_removed).floor(size) == floor


def test_budgets_are_values() -> None:
    assert Budget(macs=0.5) == Budget(macs=0.5)
    assert hash(Budget(macs=0.5, frozen=("a",))) == hash(Budget(macs=0.5, frozen=("a",)))
    with pytest.raises(AttributeError):
        Budget(macs=0.5).macs = 0.2  # type: ignore[misc]
