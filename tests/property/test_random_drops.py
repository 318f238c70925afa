"""Random networks, random branches removed: what is left computes what the original computes with those outputs zeroed.

The oracle is a forward hook on the module that a branch names as its gate; it shares nothing with the proof of attrim.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attrim
from attrim.core.branches import Branch
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.modules.names import fingerprint, named_tensors
from zoo.oracle import forward, oracle_error

from .drawing import residual, several
from .makers import WIDTHS, Draw, act, bn_relu, depthwise, linear, ln, pick
from .networks import Network, Shape, reads_channels_without_weights, step
from .steps import Residual
from .test_random_networks import TOLERANCE, macs, snapshot

EVERYDAY, SLOW = 4, 200


def zeroed(model: nn.Module, inputs: Tensor, branches: list[Branch]) -> Tensor:
    """The original's output with the branches' gates closed."""
    handles = [model.get_submodule(b.gate).register_forward_hook(lambda m, a, out: out * 0) for b in branches]
    try:
        out: Tensor = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return out


def make_plan(channels: ChannelMap, seed: int, share: float, cut: bool) -> PruningPlan:
    generator = np.random.default_rng(seed)
    drops = [b.id for b in channels.branches if generator.random() < share]
    kept = {}
    for group in channels if cut else ():
        stays = generator.random(group.size) < 0.6
        stays[generator.integers(group.size)] = True
        kept[group.id] = np.flatnonzero(stays)
    return attrim.plan_from_kept(channels, kept, drops=drops)


def check(net: Network, seed: int, share: float) -> str:
    """One case; says what became of it."""
    model, inputs = net.build()
    before = snapshot(model)
    channels = attrim.trace(model, inputs)
    blocks = [m for m in model.modules() if isinstance(m, Residual) and any(True for _ in m.body.parameters())]
    assert len(channels.branches) + len(channels.sums) >= len(blocks), "a sum was passed over in silence"
    for cut in (False, True):
        plan = make_plan(channels, seed, share, cut)
        dropped = [b for b in channels.branches if b.id in plan.provenance.get("dropped", ())]
        small = attrim.apply(model, plan)
        proof = attrim.verify(model, small, plan, inputs)
        assert proof.ok, f"{[b.id for b in dropped]}: {proof}"
        if not cut and all(b.gate for b in dropped):
            assert float((zeroed(model, inputs, dropped) - forward(small, inputs)).abs().max()) <= TOLERANCE
        if cut and plan.drops and not reads_channels_without_weights(net):
            base = attrim.apply(model, attrim.plan_from_kept(channels, {}, drops=[b.id for b in dropped]))
            error = oracle_error(base, small, plan, inputs)
            assert error is None or error <= TOLERANCE
        kept = {name: group["kept"] or channels[name].size for name, group in plan.groups.items()}
        if "einsum" not in net.kinds() or 1 not in kept.values():  # einsum multiplies it uncounted
            assert channels.cost.macs(kept, [b.id for b in dropped]) == macs(small, inputs)
        assert channels.cost.params(kept, [b.id for b in dropped]) == sum(p.numel() for p in small.parameters())
        assert plan.provenance["fingerprint_after"] == fingerprint(named_tensors(small).shapes)
        assert PruningPlan.from_json(plan.to_json()).to_json() == plan.to_json()
        again = attrim.apply(model, PruningPlan.from_json(plan.to_json()))
        assert torch.equal(forward(again, inputs), forward(small, inputs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return "dropped" if dropped else "whole"


@st.composite
def residual_networks(draw: Draw, tokens: bool) -> Network:
    """Mostly residual branches, nested up to twice, on images or on tokens."""
    wide = pick(draw, WIDTHS)
    parts = [step("conv", cin=3, cout=wide, kernel=3, groups=1, dilation=1, stride=1, bias=True)]
    shape = Shape(wide, 8)
    if tokens:
        parts.append(step("tokens"))
        shape = Shape(wide, shape.positions, tokens=True)
    makers = (residual, linear, ln, act) if tokens else (residual, residual, bn_relu, act, depthwise)
    for _ in range(draw(st.integers(1, 2))):
        block = residual(draw, shape, 0)
        parts, shape = (parts + block[0], block[1]) if block is not None else (parts, shape)
        drawn, shape = several(draw, shape, makers, 0, 0, 2)
        parts += drawn
    parts.append(step("head", channels=shape.channels, positions=shape.positions, tokens=tokens, flat=False))
    return Network(tuple(parts), draw(st.integers(0, 3)))


def run(tokens: bool, cases: int) -> Counter[str]:
    """Check that many cases; returns what became of them."""
    tally: Counter[str] = Counter()

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(residual_networks(tokens), st.integers(0, 7), st.sampled_from((0.5, 1.0)))
    def case(net: Network, seed: int, share: float) -> None:
        tally[check(net, seed, share)] += 1

    case()
    return tally


@pytest.mark.parametrize("tokens", [False, True])
def test_without_branches_equals_zeroed(tokens: bool) -> None:
    tally = run(tokens, EVERYDAY)
    assert tally["dropped"] >= 0.5 * tally.total(), f"too few networks lose a branch: {tally}"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_without_branches_equals_zeroed_many_times(tokens: bool) -> None:
    tally = run(tokens, SLOW)
    assert tally["dropped"] >= 0.5 * tally.total(), f"too few networks lose a branch: {tally}"
