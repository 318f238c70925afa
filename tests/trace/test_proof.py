"""The proof on good plans, at the door, and on cuts at the edge: single survivors, other precisions, nothing cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import InputError, PlanError
from nets import Attention, Mobile, Plain, Residual, filled, image, kept_at_random


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("net", "shape"),
    [(Plain, (2, 3, 8, 8)), (lambda: Residual((8, 12), 1), (2, 3, 8, 8)), (Mobile, (1, 3, 16, 16))],
    ids=["plain", "residual", "mobile"],
)
def test_good_plans_are_ok_and_exact(net: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> None:
    model, example = filled(net(), seed), image(*shape)
    plan = kept_at_random(attrim.trace(model, example), seed)
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact, check.conflicts, check.effects, check.dtype) == (True, True, (), {}, "float64")
    assert check.max_error == check.exact_error < 1e-12
    assert str(check) == f"ok, exact: max error {check.max_error:.2e} in float64"


def test_the_proof_is_independent_of_the_trace_that_made_the_plan() -> None:
    model, example = filled(Plain()), image()
    plan = attrim.PruningPlan.from_json(kept_at_random(attrim.trace(model, example)).to_json())
    other_batch, other_values = image(5, 3, 12, 10, seed=9), image(seed=8)
    for inputs in (example, other_batch, other_values):
        assert attrim.verify(model, attrim.apply(model, plan), plan, inputs).max_error < 1e-12


def test_an_empty_plan_is_exact_and_has_no_error_at_all() -> None:
    model = filled(Plain())
    plan = attrim.plan_from_kept(attrim.trace(model, image()), {})
    assert plan.cuts == {}
    check = attrim.verify(model, attrim.apply(model, plan), plan, image())
    assert (check.ok, check.exact, check.max_error) == (True, True, 0.0)


def test_single_survivors_everywhere() -> None:
    model, example = filled(Residual((8, 12), 1)), image()
    channels = attrim.trace(model, example)
    plan = attrim.plan_from_kept(channels, {g.id: [g.size // 2] for g in channels})
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact, str(check.conflicts)) == (True, True, "()")


@pytest.mark.parametrize("kept", [[2], [0, 3], [0, 1, 2]])
def test_a_single_surviving_group_of_a_grouped_convolution(kept: list[int]) -> None:
    layers = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 1)
    model = filled(nn.Sequential(*layers))
    channels = attrim.trace(model, image())
    assert {g.id: g.size for g in channels} == {"0": 4}
    plan = attrim.plan_from_kept(channels, {"0": kept})
    small = attrim.apply(model, plan)
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (len(kept), 2 * len(kept), 3 * len(kept))
    check = attrim.verify(model, small, plan, image())
    assert check.ok, str(check)
    assert check.max_error < 1e-12


@pytest.mark.parametrize("heads", [[1], [0, 3]])
def test_single_surviving_heads(heads: list[int]) -> None:
    model, example = filled(Attention()), image(2, 7, 12)
    plan = attrim.plan_from_kept(attrim.trace(model, example), {"qkv": heads})
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact) == (True, True), str(check)
    assert check.max_error < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_compared_in_float64(dtype: torch.dtype) -> None:
    model, example = filled(Plain()).to(dtype), image(dtype=dtype)
    plan = kept_at_random(attrim.trace(model, example))
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.dtype) == (True, "float64")
    assert check.max_error < 1e-12


def test_a_network_that_casts_is_compared_in_its_own_precision() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).float().relu())

    model, example = filled(Casts()), image(2, 4)
    plan = kept_at_random(attrim.trace(model, example))
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact, check.dtype) == (True, True, "the model's own precision")
    assert check.max_error < 1e-5


def test_dropout_and_batch_statistics_do_not_disturb_a_model_in_training_mode() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 2, 1))).train()
    plan = kept_at_random(attrim.trace(model, image()))
    small = attrim.apply(model, plan)
    check = attrim.verify(model, small, plan, image())
    assert check.max_error < 1e-12
    assert small.training
    assert small[1].num_batches_tracked.item() == model[1].num_batches_tracked.item() == 0


def test_the_tolerance_decides() -> None:
    model = filled(Plain())
    plan = kept_at_random(attrim.trace(model, image()))
    small = attrim.apply(model, plan)
    small.bn1.eps *= 1.01
    check = attrim.verify(model, small, plan, image())
    assert (check.ok, check.exact) == (False, True)
    assert 1e-9 < check.max_error < 1e-4
    assert attrim.verify(model, small, plan, image(), tolerance=1e-3).ok


def test_the_small_network_must_be_a_module_with_the_shapes_of_the_plan() -> None:
    model = filled(Plain())
    plan = kept_at_random(attrim.trace(model, image()), seed=1)
    with pytest.raises(InputError, match=r"small: expected the pruned nn\.Module, found str"):
        attrim.verify(model, "small", plan, image())
    with pytest.raises(PlanError) as caught:
        attrim.verify(model, model, plan, image())
    after = plan.cuts["conv1.weight"].shape_after
    assert f"'conv1.weight' should have shape {after}, found (8, 3, 3, 3)" in str(caught.value)
    assert "Make it with attrim.apply(model, plan)" in str(caught.value)
    with pytest.raises(PlanError, match=r"was not made for this model \(the fingerprints differ\)"):
        attrim.verify(filled(Plain(second=13)), model, plan, image())
    with pytest.raises(PlanError, match="the fingerprints differ"):
        attrim.verify(model, attrim.apply(model, plan), replace(plan, fingerprint="0" * 16), image())
