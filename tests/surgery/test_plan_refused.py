"""A plan that does not fit the model is refused, and the first differing tensor is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

import attrim
from attrim import PruningPlan
from attrim.errors import PlanError
from nets import Mobile, Plain, filled, image


@pytest.fixture
def plan() -> PruningPlan:
    channels = attrim.trace(filled(Plain()), image())
    return attrim.plan_from_kept(channels, {"conv1": [0, 1, 2], "conv2": [4, 5, 6]})


def test_a_model_without_the_tensor(plan: PruningPlan) -> None:
    with pytest.raises(PlanError) as caught:
        attrim.apply(Mobile(), plan)
    assert (
        "the plan was made for another model: it cuts 'conv1.weight' (8, 3, 3, 3), and this model has no such tensor"
        in str(caught.value)
    )
    assert "Trace this model and allocate again" in str(caught.value)


def test_a_model_of_another_width_names_the_first_tensor_that_differs(plan: PruningPlan) -> None:
    with pytest.raises(
        PlanError, match=r"another model: 'conv2\.weight' had shape \(12, 8, 3, 3\), here it has \(13, 8, 3, 3\)"
    ):
        attrim.apply(Plain(second=13), plan)
    with pytest.raises(
        PlanError, match=r"another model: 'conv1\.weight' had shape \(8, 3, 3, 3\), here it has \(9, 3, 3, 3\)"
    ):
        attrim.apply(Plain(first=9, second=13), plan)


def test_a_model_that_differs_only_in_tensors_that_stay(plan: PruningPlan) -> None:
    model = Plain()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(PlanError) as caught:
        attrim.apply(model, plan)
    assert "all tensors that it cuts fit, but the model's fingerprint is " in str(caught.value)
    assert f"and the plan's is {plan.fingerprint}" in str(caught.value)
    assert "Build the model with the same arguments" in str(caught.value)


def test_a_plan_applied_twice_is_refused(plan: PruningPlan) -> None:
    small = attrim.apply(filled(Plain()), plan)
    with pytest.raises(PlanError) as caught:
        attrim.apply(small, plan)
    assert "'conv1.weight' had shape (8, 3, 3, 3), here it has (3, 3, 3, 3)" in str(caught.value)
    assert "Apply the plan to a fresh, uncut instance" in str(caught.value)


def test_a_plan_without_a_fingerprint_is_held_to_its_shapes(plan: PruningPlan) -> None:
    bare = replace(plan, fingerprint="")
    assert attrim.apply(filled(Plain()), bare).conv1.out_channels == 3
    with pytest.raises(PlanError, match="here it has"):
        attrim.apply(Plain(first=9), bare)


def test_any_instance_of_the_class_will_do(plan: PruningPlan) -> None:
    small = attrim.apply(filled(Plain(), seed=5), PruningPlan.from_json(plan.to_json()))
    assert (small.conv1.out_channels, small.conv2.in_channels, small.head.in_features) == (3, 3, 3)


def test_dropped_branches_are_not_silently_ignored(plan: PruningPlan) -> None:
    with pytest.raises(PlanError, match=r"cuts 'conv2.weight' and also removes the module"):
        attrim.apply(filled(Plain()), replace(plan, drops=("conv2",)))
