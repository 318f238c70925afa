"""Two plans one after the other are one plan for the original: the same weights, bit by bit, and the same story."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import attrim
from attrim import PruningPlan
from attrim.errors import PlanError
from nets import Attention, Mobile, Plain, Residual, filled, image, kept_at_random, random_scores

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (2, 3, 8, 8)),
    "residual": (lambda: Residual((8, 12), 1), (1, 3, 8, 8)),
    "mobile": (Mobile, (1, 3, 16, 16)),
    "attention": (Attention, (2, 7, 12)),
}


def twice(model: nn.Module, shape: tuple[int, ...]) -> tuple[PruningPlan, PruningPlan, nn.Module]:
    """Two plans and the model that both leave, made one after the other."""
    first = kept_at_random(attrim.trace(model, image(*shape)), seed=4, least=4)
    middle = attrim.apply(model, first)
    second = kept_at_random(attrim.trace(middle, image(*shape)), seed=5)
    return first, second, attrim.apply(middle, second)


@pytest.mark.parametrize("name", NETS)
def test_a_composed_plan_equals_applying_twice(name: str) -> None:
    make, shape = NETS[name]
    model = filled(make())
    first, second, expected = twice(model, shape)
    plan = first.then(second)
    small = attrim.apply(model, plan)
    assert str(small) == str(expected)
    for (n, a), (m, b) in zip(small.state_dict().items(), expected.state_dict().items(), strict=True):
        assert n == m
        assert torch.equal(a, b), n
    for a, b in zip(small.modules(), expected.modules(), strict=True):
        assert {k: v for k, v in vars(a).items() if isinstance(v, int)} == {
            k: v for k, v in vars(b).items() if isinstance(v, int)
        }


@pytest.mark.parametrize("name", ["plain", "attention"])
def test_a_composed_plan_is_proved_against_the_original(name: str) -> None:
    make, shape = NETS[name]
    model = filled(make())
    first, second, small = twice(model, shape)
    check = attrim.verify(model, small, first.then(second), image(*shape))
    assert check.ok, str(check)
    assert check.exact_error < 1e-12


def test_the_story_runs_from_the_first_network_to_the_last() -> None:
    model = filled(Plain())
    first, second, small = twice(model, (2, 3, 8, 8))
    plan = PruningPlan.from_json(first.then(second).to_json())
    costs = plan.provenance
    assert costs["params_before"] == sum(p.numel() for p in model.parameters())
    assert costs["params_after"] == sum(p.numel() for p in small.parameters())
    assert costs["macs_before"] == attrim.trace(model, image()).cost.macs()
    assert costs["macs_after"] == attrim.trace(small, image()).cost.macs()
    assert costs["fingerprint_after"] == attrim.trace(small, image()).fingerprint
    assert plan.groups["conv1"]["size"] == 8
    assert plan.groups["conv1"]["kept"] == small.conv1.out_channels
    assert plan.cuts["conv2.weight"].shape_before == (12, 8, 3, 3)
    assert plan.cuts["conv2.weight"].shape_after == tuple(small.conv2.weight.shape)
    assert plan.summary().splitlines()[1].split()[:4] == [
        "params", f"{costs['params_before']:,}", "->", f"{costs['params_after']:,}",
    ]  # fmt: skip


def test_composition_is_associative() -> None:
    model = filled(Residual((12, 16), 1))
    plans, current = [], model
    for seed in range(3):
        plans.append(kept_at_random(attrim.trace(current, image()), seed=seed, least=6 - 2 * seed))
        current = attrim.apply(current, plans[-1])
    a, b, c = plans
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert left.cuts == right.cuts
    assert left.attributes == right.attributes
    assert left.fingerprint == right.fingerprint == a.fingerprint
    assert torch.equal(attrim.apply(model, left).fc.weight, current.fc.weight)


def test_a_whole_plan_is_neutral() -> None:
    model = filled(Plain())
    channels = attrim.trace(model, image())
    nothing, some = attrim.plan_from_kept(channels, {}), attrim.plan_from_kept(channels, {"conv1": [2, 4]})
    assert nothing.then(some).cuts == some.cuts


def test_an_optimiser_is_carried_over_both_cuts_at_once() -> None:
    model = filled(Plain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(image()).sum().backward()
    optimizer.step()
    first, second, expected = twice(model, (2, 3, 8, 8))
    middle = attrim.apply(model, first)
    stepwise = attrim.carry_optimizer(attrim.carry_optimizer(optimizer, first, model, middle), second, middle, expected)
    plan = first.then(second)
    small = attrim.apply(model, plan)
    at_once = attrim.carry_optimizer(optimizer, plan, model, small)
    for a, b in zip(small.parameters(), expected.parameters(), strict=True):
        assert torch.equal(at_once.state[a]["momentum_buffer"], stepwise.state[b]["momentum_buffer"])


def test_plans_that_do_not_follow_each_other_are_refused() -> None:
    channels = attrim.trace(filled(Plain()), image())
    plan = attrim.allocate(channels, random_scores(channels), attrim.Budget(channels=0.5))
    with pytest.raises(PlanError) as caught:
        plan.then(plan)
    assert "these plans do not follow each other: the first leaves 'conv1.weight' with shape" in str(caught.value)
    assert "the second was made for (8, 3, 3, 3)" in str(caught.value)
    assert "Trace the pruned model and allocate again" in str(caught.value)
