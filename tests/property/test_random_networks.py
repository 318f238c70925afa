"""Random networks, random cuts: what is left computes exactly what the masked original computes.

Each case draws a network (:mod:`.drawing`) and a cut, and holds it against `attrim.verify`, against an oracle that
shares nothing with attrim, against ``torch.utils.flop_counter`` and against the tensors themselves. Cases are the same
on every machine; ``HYPOTHESIS_PROFILE=explore`` draws new ones.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attrim
from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.errors import AttrimWarning, BudgetError
from zoo.oracle import leaves, oracle_error

from .drawing import FLAVOURS, networks
from .networks import STATISTICS, Network, network, reads_channels_without_weights, step

TOLERANCE = 1e-9
EVERYDAY, SLOW = 40, 250
"""Cases for each flavour."""

settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@st.composite
def cuts(draw: st.DrawFn) -> Budget | float:
    """A budget, or the chance with which every single channel stays."""
    if draw(st.booleans()):
        return draw(st.sampled_from((0.5, 0.8, 0.2)))
    limit = draw(st.sampled_from(("channels", "macs", "params")))
    return Budget(
        **{limit: draw(st.sampled_from((0.5, 0.75, 0.9, 0.3)))},
        min_keep=draw(st.sampled_from((1, 0.1, 0.5))),
        multiple_of=draw(st.sampled_from((1, 2, 4))),
        scope=draw(st.sampled_from(("global", "group", "isomorphic"))),
    )


def make_plan(channels: ChannelMap, cut: Budget | float, seed: int) -> PruningPlan:
    """Random scores within the budget (eased until it can be reached), or a random choice of channels."""
    generator = np.random.default_rng(seed)
    if isinstance(cut, Budget):
        scores = attrim.Scores({g.id: generator.random(g.size) for g in channels}, "drawn")
        for budget in (cut, *eased(cut)):
            with warnings.catch_warnings(), contextlib.suppress(BudgetError):
                warnings.simplefilter("ignore", AttrimWarning)  # tiny networks cannot always come within 1 %
                return within_limits(channels, attrim.allocate(channels, scores, budget), budget)
    kept = {}
    for group in channels:
        stays = generator.random(group.size) < cut
        stays[generator.integers(group.size)] = True
        kept[group.id] = np.flatnonzero(stays)
    return attrim.plan_from_kept(channels, kept)


def eased(budget: Budget) -> list[Budget]:
    """The same budget with weaker limits, the last of which any network meets."""
    limit = next(name for name in ("macs", "params", "channels") if getattr(budget, name) is not None)
    return [replace(budget, **{limit: kept}) for kept in (0.75, 0.9, 0.97, 1.0) if kept > getattr(budget, limit)]


def within_limits(channels: ChannelMap, plan: PruningPlan, budget: Budget) -> PruningPlan:
    """Holds a plan against its budget."""
    cost, kept = channels.cost, {name: group["kept"] for name, group in plan.groups.items()}
    for price, limit in ((cost.macs, budget.macs), (cost.params, budget.params), (cost.channels, budget.channels)):
        assert limit is None or price(kept) <= limit * price() + 1e-6
    for group in channels:
        count = kept[group.id]
        assert budget.floor(group.size) <= count <= group.size
        assert count == group.size or count % budget.multiple_of == 0
    return plan


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def macs(model: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() // 2


def check(net: Network, cut: Budget | float, seed: int) -> str:
    """One case, from the network to the proof; says what became of it."""
    model, inputs = net.build()
    before = snapshot(model)
    channels = attrim.trace(model, inputs)
    assert channels.cost.macs() == macs(model, inputs)
    assert channels.cost.params() == sum(p.numel() for p in model.parameters())
    plan = make_plan(channels, cut, seed)
    small = attrim.apply(model, plan)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the original changed"
        expected = tensor
        for dim, kept in plan.cuts[name].keep.items() if name in plan.cuts else ():
            expected = expected.index_select(dim, torch.tensor(kept))
        assert torch.equal(small.state_dict()[name], expected), f"{name} was cut wrongly"
    proof = attrim.verify(model, small, plan, inputs)
    assert proof.ok, str(proof)
    assert proof.exact or net.kinds() & STATISTICS or reads_channels_without_weights(net), (
        f"inexact without a cause: {proof}"
    )
    if proof.exact:
        assert proof.max_error <= TOLERANCE
    if not reads_channels_without_weights(net):
        error = oracle_error(model, small, plan, inputs)
        assert error is None or error <= TOLERANCE, f"the oracle differs by {error}"
    kept_counts = {name: group["kept"] for name, group in plan.groups.items()}
    if "einsum" not in net.kinds() or 1 not in kept_counts.values():  # einsum multiplies it uncounted
        assert channels.cost.macs(kept_counts) == macs(small, inputs)
    assert channels.cost.params(kept_counts) == sum(p.numel() for p in small.parameters())
    return "cut" if plan.cuts else "whole"


def run(flavour: str, cases: int) -> Counter[str]:
    """Check that many cases; returns what became of them."""
    tally: Counter[str] = Counter()

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck))
    @given(networks(flavour), cuts(), st.integers(0, 3))
    def case(net: Network, cut: Budget | float, seed: int) -> None:
        tally[check(net, cut, seed)] += 1

    case()
    return tally


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_pruned_equals_masked(flavour: str) -> None:
    tally = run(flavour, EVERYDAY)
    assert tally["cut"] >= 0.6 * tally.total(), f"too few networks really lose channels: {tally}"


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_pruned_equals_masked_a_thousand_times(flavour: str) -> None:
    tally = run(flavour, SLOW)
    assert tally["cut"] >= 0.6 * tally.total(), f"too few networks really lose channels: {tally}"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_drawn_networks_run(flavour: str) -> None:
    """The generator itself: every network runs, is no constant, and prints as the call that makes it again."""
    seen: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(networks(flavour))
    def case(net: Network) -> None:
        model, inputs = net.build()
        scores = leaves(model(inputs))[0]
        assert scores.shape == (2, 3)
        assert scores.isfinite().all()
        assert scores.std() > 0
        assert eval(repr(net), {"network": network, "step": step}) == net
        seen.update(net.kinds())

    case()
    assert len(seen) >= 10, f"the flavour uses few kinds: {seen}"
