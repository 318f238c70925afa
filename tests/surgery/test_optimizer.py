"""An optimiser carried over a cut: the state of what stays is the slice, training goes on, the old one is untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import attrim
from attrim import PruningPlan
from attrim.errors import InputError, PlanError
from nets import Plain, filled, image


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, norms and biases do not; the head learns faster."""
    named = dict(model.named_parameters())
    head = [p for n, p in named.items() if n.startswith("head")]
    wide = [p for n, p in named.items() if p.ndim > 1 and not n.startswith("head")]
    flat = [p for n, p in named.items() if p.ndim == 1 and not n.startswith("head")]
    return [
        {"params": wide, "weight_decay": 0.1},
        {"params": flat, "weight_decay": 0.0},
        {"params": head, "lr": 0.05, "name": "head"},
    ]


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: SGD(m.parameters(), lr=0.01),
    "SGD with momentum": lambda m: SGD(m.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda m: Adam(m.parameters(), lr=0.01),
    "Adam with the largest moment": lambda m: Adam(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW with groups": lambda m: AdamW(decayed(m), lr=0.01),
    "SGD with groups": lambda m: SGD(decayed(m), lr=0.01, momentum=0.9),
    "RMSprop": lambda m: RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.5),
}


def steps(model: nn.Module, optimizer: Optimizer, count: int = 3) -> list[float]:
    losses = []
    for k in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image(16, 3, 8, 8, seed=k)), torch.arange(16) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, Optimizer, PruningPlan, nn.Module]:
    """A model with three steps behind it, its optimiser, a plan, and the smaller model."""
    model = filled(Plain()).train()
    optimizer = make(model)
    steps(model, optimizer)
    channels = attrim.trace(model, image())
    plan = attrim.plan_from_kept(channels, {"conv1": [0, 2, 3, 7], "conv2": [1, 5, 6, 7, 10]})
    return model, optimizer, plan, attrim.apply(model, plan)


def sliced(tensor: Tensor, plan: PruningPlan, name: str) -> Tensor:
    for dim, kept in plan.cuts[name].keep.items() if name in plan.cuts else ():
        tensor = tensor.index_select(dim, torch.tensor(kept))
    return tensor


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_state_of_what_stays_is_the_slice(make: Callable[[nn.Module], Optimizer]) -> None:
    model, optimizer, plan, small = trained(make)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    assert type(carried) is type(optimizer)
    new = dict(small.named_parameters())
    assert {id(p) for g in carried.param_groups for p in g["params"]} == {id(p) for p in new.values()}
    compared = 0
    for name, old in model.named_parameters():
        before, after = optimizer.state.get(old, {}), carried.state.get(new[name], {})
        assert set(before) == set(after)
        for key, value in before.items():
            if isinstance(value, Tensor):
                expected = sliced(value, plan, name) if value.shape == old.shape else value
                assert torch.equal(after[key], expected), (name, key)
                assert after[key].shape in (new[name].shape, ())
                compared += after[key].numel()
            else:
                assert after[key] == value
    assert compared > 0 or isinstance(optimizer, SGD)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_groups_keep_their_settings_and_their_parameters(make: Callable[[nn.Module], Optimizer]) -> None:
    model, optimizer, plan, small = trained(make)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    old_names = {id(p): n for n, p in model.named_parameters()}
    new_names = {id(p): n for n, p in small.named_parameters()}
    assert len(carried.param_groups) == len(optimizer.param_groups)
    for before, after in zip(optimizer.param_groups, carried.param_groups, strict=True):
        assert [new_names[id(p)] for p in after["params"]] == [old_names[id(p)] for p in before["params"]]
        assert {k: v for k, v in after.items() if k != "params"} == {k: v for k, v in before.items() if k != "params"}
    assert carried.defaults == optimizer.defaults


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_training_goes_on_exactly_as_with_a_state_loaded_by_hand(make: Callable[[nn.Module], Optimizer]) -> None:
    model, optimizer, plan, small = trained(make)
    twin = attrim.apply(model, plan)
    by_hand = make(twin)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    old = {n: optimizer.state.get(p, {}) for n, p in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        by_hand.state[parameter] = {
            k: sliced(v, plan, name).clone()
            if isinstance(v, Tensor) and v.ndim
            else v.clone()
            if isinstance(v, Tensor)
            else v
            for k, v in old[name].items()
        }
    assert steps(small, carried) == steps(twin, by_hand)
    for a, b in zip(small.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_old_optimiser_and_the_old_model_stay_as_they_were(make: Callable[[nn.Module], Optimizer]) -> None:
    model, optimizer, plan, small = trained(make)
    weights = [p.detach().clone() for p in model.parameters()]
    state = {
        p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in optimizer.state.items()
    }
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    steps(small, carried)
    carried.param_groups[0]["lr"] = 99.0
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert set(state) == set(optimizer.state)
    for parameter, entries in state.items():
        for key, value in entries.items():
            now = optimizer.state[parameter][key]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value


def test_a_fresh_optimiser_has_no_state_to_carry_and_learns() -> None:
    model = filled(Plain())
    optimizer = Adam(model.parameters(), lr=0.01)
    plan = attrim.plan_from_kept(attrim.trace(model, image()), {"conv1": [1, 2]})
    small = attrim.apply(model, plan).train()
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    assert len(carried.state) == 0
    before = small.conv1.weight.detach().clone()
    steps(small, carried, 1)
    assert not torch.equal(before, small.conv1.weight)


def test_an_optimiser_under_a_schedule_steps_the_new_model() -> None:
    model, optimizer, plan, small = trained(MAKERS["SGD with momentum"])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    new = torch.optim.lr_scheduler.StepLR(carried, 1, gamma=0.5)
    old_weight, small_weight = model.conv1.weight.detach().clone(), small.conv1.weight.detach().clone()
    steps(small, carried, 1)
    new.step()
    assert torch.equal(model.conv1.weight, old_weight)
    assert not torch.equal(small.conv1.weight, small_weight)
    assert (carried.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (0.005, 0.01)


def test_an_optimiser_of_some_parameters_stays_one_of_some() -> None:
    model, _, plan, small = trained(MAKERS["SGD"])
    optimizer = SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    assert [p is q for p, q in zip(carried.param_groups[0]["params"], small.head.parameters(), strict=True)] == [
        True,
        True,
    ]


def test_the_state_survives_a_round_trip() -> None:
    model, optimizer, plan, small = trained(MAKERS["AdamW with groups"])
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    loaded = MAKERS["AdamW with groups"](small)
    loaded.load_state_dict(carried.state_dict())
    key = small.conv2.weight
    assert torch.equal(loaded.state[key]["exp_avg_sq"], carried.state[key]["exp_avg_sq"])
    assert loaded.param_groups[2]["lr"] == 0.05


def test_tied_parameters_are_carried_once() -> None:
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)))
    model[2].weight = model[1].weight
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(image(3, 4)).sum().backward()
    optimizer.step()
    plan = attrim.plan_from_kept(attrim.trace(model, image(3, 4)), {"0": [0, 1, 4]})
    small = attrim.apply(model, plan)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    assert len(carried.param_groups[0]["params"]) == 7
    assert torch.equal(
        carried.state[small[2].weight]["momentum_buffer"],
        optimizer.state[model[1].weight]["momentum_buffer"][[0, 1, 4]][:, [0, 1, 4]],
    )


def test_a_parameter_of_another_model_is_refused() -> None:
    model, _, plan, small = trained(MAKERS["SGD"])
    stranger = SGD(filled(Plain()).parameters(), lr=0.1)
    with pytest.raises(InputError) as caught:
        attrim.carry_optimizer(stranger, plan, model, small)
    assert "the optimiser holds a parameter of shape (8, 3, 3, 3) that is not in the old model" in str(caught.value)
    assert "Pass the model that the optimiser was made for" in str(caught.value)


def test_a_new_model_that_does_not_follow_the_plan_is_refused() -> None:
    model, optimizer, plan, _ = trained(MAKERS["SGD"])
    with pytest.raises(PlanError) as caught:
        attrim.carry_optimizer(optimizer, plan, model, model)
    assert "'conv1.weight' should have shape (4, 3, 3, 3), found (8, 3, 3, 3)" in str(caught.value)
    assert "Make it with attrim.apply(old, plan)" in str(caught.value)
    with pytest.raises(PlanError, match=r"'conv1\.weight' should have shape \(4, 3, 3, 3\), found None"):
        attrim.carry_optimizer(optimizer, plan, model, nn.Linear(2, 2))
