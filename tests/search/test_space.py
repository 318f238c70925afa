"""Ratios onto the budget, on the cost models of real networks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attrim
from attrim import Budget, ChannelMap, Scores
from attrim.errors import BudgetError, InputError
from attrim.search.space import Space
from nets import random_scores

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar_resnet.py"


def network(name: str) -> tuple[torch.nn.Module, int]:
    if name == "resnet56":
        spec = importlib.util.spec_from_file_location("cifar_resnet", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.resnet56(), 32
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        return getattr(models, name)(), 64


@pytest.fixture(scope="module", params=["resnet56", "resnet50", "mobilenet_v2", "densenet121"])
def traced(request) -> tuple[str, ChannelMap]:
    model, side = network(request.param)
    if request.param != "resnet56":
        model = model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    return request.param, attrim.trace(model, torch.zeros(1, 3, side, side))


def even(channels: ChannelMap) -> Scores:
    return Scores({g.id: torch.ones(g.size) for g in channels}, "even")


def test_the_cost_is_the_known_one(traced) -> None:
    name, channels = traced
    known = {"resnet56": 125_485_696}
    assert channels.cost.macs() == known.get(name, channels.cost.macs())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.3, 0.5, 0.7]))
def test_random_ratios_land_on_the_budget(traced, seed, fraction) -> None:
    _, channels = traced
    space = Space.of(channels, even(channels), Budget(macs=fraction))
    ratios = np.random.default_rng(seed).uniform(-0.3, 1.3, len(space))
    kept = space.project(ratios)
    target, whole = fraction * channels.cost.macs(), channels.cost.macs()
    assert channels.cost.macs(kept) <= target
    assert channels.cost.macs(kept) >= target - 0.005 * whole
    assert space.fits(kept)
    assert kept == space.project(ratios)


def test_a_common_shift_of_the_ratios_changes_nothing(traced) -> None:
    _, channels = traced
    space = Space.of(channels, even(channels), Budget(macs=0.5))
    ratios = np.random.default_rng(0).uniform(0.2, 0.8, len(space))
    assert abs(np.subtract(space.project(ratios), space.project(ratios + 0.125))).max() <= 1


def test_kept_sets_are_nested_as_the_ratios_fall(residual) -> None:
    space = Space.of(residual, random_scores(residual), Budget(macs=0.5))
    ratios = np.random.default_rng(1).uniform(0, 1, len(space))
    steps = np.array([space.at(ratios, shift) for shift in np.linspace(-1, 1, 41)])
    assert (np.diff(steps, axis=0) >= 0).all()
    assert (steps[0] == space.floors).all()
    assert (steps[-1] == residual.cost.sizes).all()
    tight, loose = (Space.of(residual, random_scores(residual), Budget(macs=m)).project(ratios) for m in (0.3, 0.6))
    assert (np.array(tight) <= np.array(loose)).mean() > 0.9


@pytest.mark.parametrize("multiple", [4, 8])
def test_multiples_floors_and_frozen_groups(residual, multiple) -> None:
    budget = Budget(macs=0.5, multiple_of=multiple, min_keep=0.25, frozen=("conv1.*",))
    space = Space.of(residual, random_scores(residual), budget)
    names = residual.cost.groups
    for seed in range(5):
        kept = space.project(np.random.default_rng(seed).uniform(0, 1, len(space)))
        assert all(k % multiple == 0 or k == n for k, n in zip(kept, residual.cost.sizes.tolist(), strict=True))
        assert all(k >= 0.25 * n for k, n in zip(kept, residual.cost.sizes.tolist(), strict=True))
        assert kept[names.index("conv1")] == residual["conv1"].size
        assert residual.cost.macs(kept) <= 0.5 * residual.cost.macs()


def test_all_limits_hold_at_once(residual) -> None:
    space = Space.of(residual, random_scores(residual), Budget(macs=0.6, params=0.4, channels=0.9))
    kept = space.project(np.full(len(space), 0.5))
    cost = residual.cost
    assert cost.macs(kept) <= 0.6 * cost.macs()
    assert 0.395 * cost.params() <= cost.params(kept) <= 0.4 * cost.params()
    assert cost.channels(kept) <= 0.9 * cost.channels()


def test_what_fits_whole_stays_whole(plain) -> None:
    space = Space.of(plain, random_scores(plain), Budget(macs=1.0))
    assert space.project(np.zeros(len(space))) == tuple(plain.cost.sizes.tolist())


def test_wrong_use_is_said(plain) -> None:
    space = Space.of(plain, random_scores(plain), Budget(macs=0.5))
    with pytest.raises(InputError, match="expected 2 finite numbers"):
        space.project(np.array([0.5]))
    with pytest.raises(InputError, match="expected 2 finite numbers"):
        space.project(np.array([0.5, np.nan]))
    with pytest.raises(BudgetError, match="smallest reachable"):
        Space.of(plain, random_scores(plain), Budget(macs=0.01, min_keep=0.5))
