"""Plans and pruned networks that were damaged by hand: each is reported, with the names of the tensors or the line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import attrim
from attrim import PruningPlan, Verification
from attrim.core.plan import Cut
from nets import Attention, Mobile, Plain, filled, image, kept_at_random


def checked(model: nn.Module, plan: PruningPlan, example: Any) -> Verification:
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert not check.ok
    assert str(check).startswith("not ok: ")
    return check


def texts(check: Verification) -> str:
    return "\n".join(str(c) for c in check.conflicts)


@pytest.fixture
def plain() -> tuple[nn.Module, PruningPlan]:
    """``Plain`` with channels 0, 3, 5 of the first layer and 1, 2, 8 of the second."""
    model = filled(Plain())
    return model, attrim.plan_from_kept(attrim.trace(model, image()), {"conv1": [0, 3, 5], "conv2": [1, 2, 8]})


def without(plan: PruningPlan, *names: str) -> PruningPlan:
    return replace(plan, cuts={n: c for n, c in plan.cuts.items() if n not in names})


def keeping(plan: PruningPlan, name: str, dim: int, kept: tuple[int, ...], shape: tuple[int, ...] = ()) -> PruningPlan:
    """The plan with another selection on one axis."""
    cut = plan.cuts.get(name, Cut(shape, {}))
    return replace(plan, cuts={**plan.cuts, name: Cut(cut.shape_before, {**cut.keep, dim: kept})})


@pytest.mark.parametrize("tensor", ["bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"])
def test_a_member_that_was_forgotten(plain: tuple[nn.Module, PruningPlan], tensor: str) -> None:
    model, plan = plain
    check = checked(model, without(plan, tensor), image())
    assert f"conv1.weight:0[1] is removed but {tensor}:0[1], which belongs to it, stays" in texts(check)


def test_an_input_axis_that_was_forgotten(plain: tuple[nn.Module, PruningPlan]) -> None:
    model, plan = plain
    cut = plan.cuts["conv2.weight"]
    broken = replace(plan, cuts={**plan.cuts, "conv2.weight": Cut(cut.shape_before, {0: cut.keep[0]})})
    check = checked(model, broken, image())
    assert "conv1.weight:0[1] is removed but conv2.weight:1[1], which belongs to it, stays" in texts(check)
    assert "expected input[2, 3, 8, 8] to have 8 channels, but got 3 channels" in texts(check)
    assert "in module 'conv2', at " in texts(check)


def test_other_positions_in_a_tied_tensor(plain: tuple[nn.Module, PruningPlan]) -> None:
    model, plan = plain
    check = checked(model, keeping(plan, "bn1.running_mean", 0, (0, 3, 6)), image())  # runs, and is wrong
    assert "bn1.running_mean:0[5] is removed but conv1.weight:0[5], which belongs to it, stays" in texts(check)
    assert "conv1.weight:0[6] is removed but bn1.running_mean:0[6], which belongs to it, stays" in texts(check)
    lines = [c.reason for c in check.conflicts if c.reason.module == "bn1"]
    assert [(r.text, r.operator) for r in lines[:1]] == [
        ("combines positions of different channels", "aten.native_batch_norm")
    ]
    assert "nets.py:" in lines[0].source


def test_other_columns_than_rows(plain: tuple[nn.Module, PruningPlan]) -> None:
    model, plan = plain
    check = checked(model, keeping(plan, "head.weight", 1, (1, 2, 9)), image())
    assert "head.weight:1[8] is removed but conv2.weight:0[8], which belongs to it, stays" in texts(check)
    assert "combines positions of different channels (aten.addmm, in module 'head', at " in texts(check)


def test_a_pinned_position_that_was_removed(plain: tuple[nn.Module, PruningPlan]) -> None:
    model, plan = plain
    broken = keeping(keeping(plan, "head.weight", 0, (0, 1, 2, 3)), "head.bias", 0, (0, 1, 2, 3), (5,))
    check = checked(model, broken, image())
    assert "head.weight:0[4] is removed but must stay: is an output of the network" in texts(check)


def test_a_removed_input_channel(plain: tuple[nn.Module, PruningPlan]) -> None:
    model, plan = plain
    check = checked(model, keeping(plan, "conv1.weight", 1, (0, 2)), image())
    assert "conv1.weight:1[1] is removed but must stay: contracted with an axis that does not follow the cut" in texts(
        check
    )
    assert "expected input[2, 3, 8, 8] to have 2 channels, but got 3 channels" in texts(check)


def test_one_of_two_positions_of_a_channel() -> None:
    model, example = filled(Attention()), image(2, 7, 12)
    plan = attrim.plan_from_kept(attrim.trace(model, example), {"qkv": [0, 1]})
    rows = tuple(r for r in range(72) if r % 24 not in (5, 23))  # places from different heads
    check = checked(model, replace(keeping(plan, "qkv.weight", 0, rows), attributes={}), example)
    assert "qkv.weight:0[5] is removed but qkv.weight:0[0], which belongs to it, stays" in texts(check)


def test_an_attribute_that_was_not_repaired() -> None:
    model, example = filled(Attention()), image(2, 7, 12)
    plan = attrim.plan_from_kept(attrim.trace(model, example), {"qkv": [0, 1]})
    assert plan.attributes[""]["num_heads"].after == 2
    check = checked(model, replace(plan, attributes={}), example)
    assert "shape '[2, 7, 3, 4, 6]' is invalid" in texts(check)
    assert "nets.py:" in texts(check)


def test_every_damaged_tensor_of_the_small_network_is_named(plain: tuple[nn.Module, PruningPlan]) -> None:
    model, plan = plain
    for name in dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if b.is_floating_point()}:
        small = attrim.apply(model, plan)
        with torch.no_grad():
            tensor = small.state_dict()[name].view(-1)
            tensor[-1] += 1e-4 * tensor.abs().max()
        check = attrim.verify(model, small, plan, image())
        assert not check.ok, name
        assert 1e-9 < check.max_error < 1e-2, name
        assert (
            texts(check)
            == f"'{name}' does not hold the original's values at the kept positions; verify before any recovery"
        )


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "eps": lambda m: setattr(m.bn1, "eps", 0.1),
    "stride": lambda m: setattr(m.conv2, "stride", (2, 2)),
    "swapped rows": lambda m: m.conv1.weight.data.copy_(m.conv1.weight.data.flip(0)),
    "a fresh norm": lambda m: setattr(m, "bn1", nn.BatchNorm2d(3).eval()),
    "NaN": lambda m: m.conv2.bias.data.fill_(float("nan")),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_other_settings_and_swapped_weights_are_caught(
    plain: tuple[nn.Module, PruningPlan], change: Callable[[Any], Any]
) -> None:
    model, plan = plain
    small = attrim.apply(model, plan)
    change(small)
    assert not attrim.verify(model, small, plan, image()).ok


def test_a_head_of_zeros_does_not_hide_damage() -> None:
    model = filled(Plain())
    nn.init.zeros_(model.head.weight)
    plan = kept_at_random(attrim.trace(model, image()), seed=1, least=2)
    small = attrim.apply(model, plan)
    assert attrim.verify(model, small, plan, image()).max_error < 1e-12
    with torch.no_grad():
        small.conv1.weight.mul_(1.01)
    assert not attrim.verify(model, small, plan, image()).ok


@pytest.mark.parametrize("name", ["proj.weight", "qkv.bias", "embed.weight", "norm.weight", "head.bias"])
def test_damage_is_caught_in_an_inexact_cut(name: str) -> None:
    model, example = filled(Attention()), image(2, 7, 12)
    channels = attrim.trace(model, example)
    plan = attrim.plan_from_kept(channels, {"embed": range(12), "qkv": [0, 3]})
    small = attrim.apply(model, plan)
    assert attrim.verify(model, small, plan, example).ok
    with torch.no_grad():
        small.get_parameter(name).mul_(2)
    assert not attrim.verify(model, small, plan, example).ok


def test_another_network_of_the_right_shapes_is_caught() -> None:
    example = image(1, 3, 16, 16)
    model = filled(Mobile())
    plan = kept_at_random(attrim.trace(model, example), seed=2, least=4)
    stranger = attrim.apply(filled(Mobile(), seed=1), plan)
    check = attrim.verify(model, stranger, plan, example)
    assert not check.ok
    assert check.max_error > 1e-2
