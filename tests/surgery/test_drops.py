"""Dropped branches are physically gone, and what is left is the original with their outputs zeroed at the sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import STYLES, Net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attrim
from attrim.core.branches import Branch
from attrim.errors import InputError, PlanError
from attrim.modules.names import fingerprint, named_tensors
from nets import Plain, Residual, filled

SHORTCUTS = (("identity", 8, 1), ("project", 12, 2), ("pool", 12, 2), ("pad", 12, 2), ("project", 8, 1))


def net(*blocks: tuple[str, int, int, str], seed: int = 0) -> nn.Module:
    return filled(Net(*blocks), seed=seed).double().eval()


def picture(size: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def closed(model: nn.Module, branches: list[Branch], x: Tensor) -> Tensor:
    """The original with the gates of these branches closed."""
    handles = [model.get_submodule(b.gate).register_forward_hook(lambda m, a, out: out * 0) for b in branches]
    out = run(model, x)
    for handle in handles:
        handle.remove()
    return out


def random_kept(channels: attrim.ChannelMap, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {g.id: np.sort(rng.permutation(g.size)[: max(1, g.size * 2 // 3)]) for g in channels if rng.random() < 0.7}


def check_plan(model: nn.Module, channels: attrim.ChannelMap, plan: attrim.PruningPlan, x: Tensor) -> nn.Module:
    """Everything that is promised of a plan with drops."""
    small = attrim.apply(model, plan)
    check = attrim.verify(model, small, plan, x)
    assert check.ok, str(check)
    with FlopCounterMode(display=False) as counter:
        run(small, x)
    assert counter.get_total_flops() == 2 * plan.provenance["macs_after"]
    assert sum(p.numel() for p in small.parameters()) == plan.provenance["params_after"]
    assert fingerprint(named_tensors(small).shapes) == plan.provenance["fingerprint_after"]
    assert set(small.state_dict()) <= set(model.state_dict())
    return small


@pytest.mark.parametrize("shortcut", SHORTCUTS, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("style", STYLES)
def test_every_style(style: str, shortcut: tuple[str, int, int]) -> None:
    kind, width, stride = shortcut
    model, x = net((style, width, stride, kind), (style, width, 1, "identity")), picture()
    channels = attrim.trace(model, x)
    assert channels.sums == ()
    assert len(channels.branches) == (4 if style == "TwoBranches" else 2)
    assert [b.shortcut for b in channels.branches][-1] == "identity"
    every = [b.id for b in channels.branches]
    small = check_plan(model, channels, attrim.plan_from_kept(channels, {}, drops=every), x)
    if all(b.gate for b in channels.branches):
        for size in (12, 9):
            ours, theirs = run(small, picture(size, 3)), closed(model, list(channels.branches), picture(size, 3))
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    check_plan(model, channels, attrim.plan_from_kept(channels, random_kept(channels, 0), drops=every[:1]), x)


@st.composite
def stacks(draw: st.DrawFn) -> list[tuple[str, int, int, str]]:
    blocks, width = [], 8
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("identity", "identity", "project", "pool", "pad")))
        wider, stride = (0, 1) if kind == "identity" else (draw(st.sampled_from((0, 4))), draw(st.sampled_from((1, 2))))
        width += wider
        blocks.append((draw(st.sampled_from(sorted(STYLES))), width, stride, kind))
    return blocks


@settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(stacks(), st.integers(0, 9), st.sampled_from((9, 12)))
def test_random_stacks(blocks: list[tuple[str, int, int, str]], seed: int, size: int) -> None:
    check_stack(blocks, seed, size)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(stacks(), st.integers(0, 9), st.sampled_from((9, 12)))
def test_many_random_stacks(blocks: list[tuple[str, int, int, str]], seed: int, size: int) -> None:
    check_stack(blocks, seed, size)


def check_stack(blocks: list[tuple[str, int, int, str]], seed: int, size: int) -> None:
    model, x = net(*blocks, seed=seed), picture(size)
    channels = attrim.trace(model, x)
    rng = np.random.default_rng(seed)
    chosen = [b for b in channels.branches if rng.random() < 0.6]
    ids = [b.id for b in chosen]
    small = check_plan(model, channels, attrim.plan_from_kept(channels, {}, drops=ids), x)
    if all(b.gate for b in chosen):
        assert torch.allclose(run(small, x), closed(model, chosen, x), rtol=0, atol=1e-12)
    check_plan(model, channels, attrim.plan_from_kept(channels, random_kept(channels, seed), drops=ids), x)


# -- what a user does with it ---------------------------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    return filled(Residual((8, 12), blocks=2)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_modules_are_gone(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {"layers.3.conv1": [0, 1, 2]}, drops=["layers.1", "layers.2"])
    small = attrim.apply(model, plan)
    assert plan.drops == ("layers.1", "layers.2.conv1", "layers.2.bn1", "layers.2.conv2", "layers.2.bn2")
    assert isinstance(small.layers[1], nn.Identity)
    assert not list(small.layers[2].conv1.parameters())
    assert small.layers[2].down[0].weight.shape == (12, 8, 1, 1)
    assert "layers.1.conv1.weight" not in small.state_dict()
    assert plan.groups["layers.1.conv1"]["kept"] == 0
    assert plan.groups["layers.3.conv1"]["kept"] == 3
    assert len(model.layers[1].conv1.weight) == 8  # the original is not touched


def test_zeros_follow_the_cut_of_the_shortcut(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    group = channels.branches[2].widths[0][0]
    plan = attrim.plan_from_kept(channels, {group: [1, 4, 5, 7, 9]}, drops=["layers.2"])
    assert plan.cuts["layers.2.conv1.zeros"].shape_before == (12,)
    assert plan.cuts["layers.2.conv1.zeros"].keep == {0: (1, 4, 5, 7, 9)}
    assert "layers.2.conv2.weight" not in plan.cuts
    small = attrim.apply(model, plan)
    assert small.layers[2].conv1(x[:, :1]).shape == (2, 5, 8, 8)
    assert attrim.verify(model, small, plan, x).ok


def test_a_fresh_instance_needs_no_tracing(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, random_kept(channels, 1), drops=["layers.0", "layers.2"])
    small = attrim.apply(model, plan)
    attrim.save(small, plan, tmp_path)
    again = attrim.load(tmp_path, Residual((8, 12), blocks=2)).eval()
    assert torch.equal(run(again, x), run(small, x))
    assert attrim.PruningPlan.load(tmp_path / "plan.json") == plan


def test_plans_compose(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    group = channels.branches[2].widths[0][0]
    first = attrim.plan_from_kept(channels, {group: range(1, 11), "layers.1.conv1": [0, 1]}, drops=["layers.2"])
    once = attrim.apply(model, first)
    second_map = attrim.trace(once, x)
    assert [b.id for b in second_map.branches] == ["layers.0", "layers.1", "layers.3"]
    wide = next(g.id for g in second_map if any(m.axis.tensor == "layers.2.conv1.zeros" for m in g.members))
    second = attrim.plan_from_kept(second_map, {wide: [0, 2, 4, 6]}, drops=["layers.1"])
    twice = attrim.apply(once, second)
    both = first.then(second)
    joined = attrim.apply(model, both)
    assert both.drops == (*first.drops, "layers.1")
    assert both.provenance["dropped"] == ["layers.2", "layers.1"]
    assert "dropped  layers.2, layers.1" in both.summary()
    assert both.cuts["layers.2.conv1.zeros"].keep == {0: (1, 3, 5, 7)}
    assert not any(name.startswith("layers.1.") for name in both.cuts)
    assert torch.equal(run(joined, x), run(twice, x))
    assert attrim.verify(model, joined, both, x).ok
    assert attrim.PruningPlan.from_json(both.to_json()) == both


def test_dropping_what_contains_an_earlier_drop(x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.inner = nn.Sequential(*filled(Residual((8,), blocks=2)).layers)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return x + self.norm(self.inner(x))

    model = filled(Outer()).eval()
    channels = attrim.trace(model, x)
    inside = {b.id: b.inside for b in channels.branches}
    assert inside == {"inner.0": "inner", "inner.1": "inner", "inner": ""}
    first = attrim.plan_from_kept(channels, {"inner.1.conv1": [0, 3]}, drops=["inner.0"])
    once = attrim.apply(model, first)
    second = attrim.plan_from_kept(attrim.trace(once, x), {}, drops=["inner"])
    both = first.then(second)
    assert "inner" in both.drops
    assert not any(name.startswith("inner.") for name in (*both.drops, *both.cuts))
    assert torch.equal(run(attrim.apply(model, both), x), run(attrim.apply(once, second), x))
    assert attrim.verify(model, attrim.apply(model, both), both, x).ok
    whole = attrim.plan_from_kept(channels, {}, drops=["inner"])
    assert whole.provenance["dropped"] == ["inner.0", "inner.1", "inner"]
    assert whole.provenance["channels_after"] == channels.cost.channels(drops=["inner"])


def test_the_optimiser_goes_along(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, random_kept(channels, 2), drops=["layers.1", "layers.2"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()(x).square().sum().backward()
    optimizer.step()
    small = attrim.apply(model, plan)
    carried = attrim.carry_optimizer(optimizer, plan, model, small)
    held = [p for group in carried.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()}
    assert all(carried.state[p]["momentum_buffer"].shape == p.shape for p in held)
    small(x).square().sum().backward()
    carried.step()


def test_it_trains_and_keeps_dtype_and_flags(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {}, drops=[b.id for b in channels.branches])
    small = attrim.apply(model.train(), plan)
    assert all(m.training for m in small.modules())
    assert small.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert small.double()(x.double()).dtype == torch.float64
    small(x.double()).sum().backward()
    assert small.conv1.weight.grad is not None
    assert small.to("meta")(x.to("meta")).shape == (2, 10)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_branch(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    with pytest.raises(InputError, match=r"'layers.2.conv1' is not a residual branch .* layers.0, layers.1"):
        attrim.plan_from_kept(channels, {}, drops=["layers.2.conv1"])
    plain = attrim.trace(filled(Plain()), x)
    with pytest.raises(InputError, match="This network has none"):
        attrim.plan_from_kept(plain, {}, drops=["conv1"])


def test_a_module_that_is_no_branch_does_not_verify(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {})
    after = {name: shape for name, shape in channels.shapes.items() if not name.startswith("layers.3.bn1.")}
    wrong = replace(plan, drops=("layers.3.bn1",), provenance={"fingerprint_after": fingerprint(after)})
    check = attrim.verify(model, attrim.apply(model, wrong), wrong, x)
    assert not check.ok
    assert "'layers.3.bn1', which is not a whole residual branch; it is part of the branch 'layers.3'" in str(check)


def test_a_branch_replaced_by_the_wrong_thing_does_not_verify(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {}, drops=["layers.2"])
    wrong = replace(plan, replacements={})  # every module an identity: the input passes, in the wrong shape
    check = attrim.verify(model, attrim.apply(model, wrong), wrong, x)
    assert not check.ok
    assert "without the dropped branches" in str(check)


def test_other_values_do_not_verify(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {}, drops=["layers.1"])
    small = attrim.apply(model, plan)
    with torch.no_grad():
        small.layers[0].bn2.bias[0] += 1e-3
    check = attrim.verify(model, small, plan, x)
    assert not check.ok
    assert "layers.0.bn2.bias" in str(check)


def test_a_network_that_kept_its_branch_does_not_follow_the_plan(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {}, drops=["layers.1"])
    with pytest.raises(PlanError, match=r"still has 'layers.1"):
        attrim.verify(model, model, plan, x)


def test_a_plan_for_another_network(model: nn.Module, x: Tensor) -> None:
    channels = attrim.trace(model, x)
    plan = attrim.plan_from_kept(channels, {}, drops=["layers.1"])
    with pytest.raises(PlanError, match=r"removes the module 'layers.9', which this model does not have"):
        attrim.apply(model, replace(plan, drops=("layers.9",)))
    cut = attrim.plan_from_kept(channels, {"layers.1.conv1": [0]})
    with pytest.raises(PlanError, match=r"cuts 'layers.1.conv1.weight' and also removes the module"):
        attrim.apply(model, replace(cut, drops=("layers.1",)))
