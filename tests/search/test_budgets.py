"""Every limit of a budget holds, the tightest one is met within 1 % of the original, and the plan is what the cost says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attrim
from attrim import Budget, ChannelMap, PruningPlan, Scores
from attrim.errors import AttrimWarning
from nets import Mobile, filled, random_scores

COSTS = ("macs", "params", "channels")


def ratios(plan: PruningPlan) -> dict[str, float]:
    return {name: plan.provenance[f"{name}_after"] / plan.provenance[f"{name}_before"] for name in COSTS}


def widths(plan: PruningPlan) -> dict[str, int]:
    return {name: note["kept"] for name, note in plan.groups.items()}


LIMITS: list[dict[str, Any]] = [
    {"macs": 0.9},
    {"macs": 0.5},
    {"macs": 0.2},
    {"params": 0.6},
    {"params": 0.25},
    {"channels": 0.7},
    {"channels": 0.3},
    {"macs": 0.5, "params": 0.5},
    {"macs": 0.5, "params": 0.3, "channels": 0.9},
    {"macs": 0.8, "params": 0.8, "channels": 0.5},
    {"macs": 0.35, "params": 0.9, "scope": "group"},
    {"params": 0.4, "scope": "isomorphic"},
    {"macs": 0.5, "multiple_of": 4},
    {"macs": 0.5, "multiple_of": 8},
    {"macs": 0.5, "min_keep": 0.3},
    {"macs": 0.5, "max_removed": 0.5},
]


@pytest.mark.filterwarnings("error::attrim.AttrimWarning")
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("net", ["residual", "mobile"])
def test_all_limits_hold_and_the_tightest_is_met_within_a_percent(
    net: str, limits: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    channels: ChannelMap = request.getfixturevalue(net)
    plan = attrim.allocate(channels, random_scores(channels), Budget(**limits))
    gaps = {name: limits[name] - ratio for name, ratio in ratios(plan).items() if name in limits}
    assert min(gaps.values()) >= 0, gaps
    assert min(gaps.values()) <= 0.01, gaps
    assert plan.provenance["macs_after"] == channels.cost.macs(widths(plan))
    assert plan.provenance["params_after"] == channels.cost.params(widths(plan))
    assert plan.provenance["channels_after"] == sum(widths(plan).values())
    assert all(1 <= kept <= channels[name].size for name, kept in widths(plan).items())


@pytest.mark.parametrize("seed", range(3))
def test_the_cut_network_has_the_parameters_that_were_asked_for(mobile: ChannelMap, seed: int) -> None:
    model = filled(Mobile())
    plan = attrim.allocate(mobile, random_scores(mobile, seed), Budget(params=0.4))
    small = attrim.apply(model, plan)
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.39 <= kept <= 0.4


def test_the_best_channels_of_every_group_stay(residual: ChannelMap) -> None:
    scores = random_scores(residual, 3)
    plan = attrim.allocate(residual, scores, Budget(macs=0.4))
    for group in residual:
        count = plan.groups[group.id]["kept"]
        best = torch.topk(scores.values[group.id], count).indices.sort().values
        member = group.members[0]
        expected = sorted(member.index[best.numpy()].ravel().tolist())
        cut = plan.cuts.get(member.axis.tensor)
        found = list(cut.keep[member.axis.dim]) if cut and member.axis.dim in cut.keep else list(range(group.size))
        assert found == expected


def test_a_whole_budget_cuts_nothing(plain: ChannelMap) -> None:
    plan = attrim.allocate(plain, random_scores(plain), Budget(macs=1.0, params=1.0, channels=1.0))
    assert plan.cuts == {}
    assert ratios(plan) == {"macs": 1.0, "params": 1.0, "channels": 1.0}


def test_every_limit_binds_where_it_is_the_tightest(residual: ChannelMap) -> None:
    scores = random_scores(residual)
    alone = {name: ratios(attrim.allocate(residual, scores, Budget(**{name: 0.5}))) for name in COSTS}
    both = ratios(attrim.allocate(residual, scores, Budget(macs=0.5, params=0.5, channels=0.5)))
    for name in COSTS:
        assert alone[name][name] == pytest.approx(0.5, abs=0.01)
        assert both[name] <= 0.5
    assert max(both.values()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("scope", ["global", "group", "isomorphic"])
def test_the_same_scores_give_the_same_plan(mobile: ChannelMap, scope: Any) -> None:
    budget = Budget(macs=0.4, scope=scope)
    first, second = (attrim.allocate(mobile, random_scores(mobile), budget) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.to_json() != attrim.allocate(mobile, random_scores(mobile, 1), budget).to_json()


def test_a_smaller_budget_never_keeps_more_of_the_network(residual: ChannelMap) -> None:
    scores = random_scores(residual)
    costs = [
        attrim.allocate(residual, scores, Budget(macs=k)).provenance["macs_after"] for k in (0.9, 0.7, 0.5, 0.3, 0.1)
    ]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 5


@pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")
def test_scores_and_map_are_not_changed(plain: ChannelMap) -> None:
    scores = random_scores(plain)
    values, table = {g: v.clone() for g, v in scores.values.items()}, plain.table()
    attrim.allocate(plain, scores, Budget(macs=0.5))
    assert all(torch.equal(values[g], v) for g, v in scores.values.items())
    assert plain.table() == table


@pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")
def test_the_plan_says_how_it_came_about(plain: ChannelMap) -> None:
    plan = attrim.allocate(
        plain, Scores({"conv1": range(8), "conv2": range(12)}, "mine"), Budget(macs=0.5, frozen=("head.*",))
    )
    assert plan.provenance["criterion"] == "mine"
    assert {k: plan.provenance["budget"][k] for k in ("macs", "frozen", "scope")} == {
        "macs": 0.5, "frozen": ["head.*"], "scope": "global",
    }  # fmt: skip
    assert PruningPlan.from_json(plan.to_json()).provenance == plan.provenance


def test_widths_that_are_too_coarse_are_warned_about(plain: ChannelMap) -> None:
    with pytest.warns(AttrimWarning) as caught:
        plan = attrim.allocate(plain, random_scores(plain), Budget(macs=0.6, multiple_of=4))
    gap = 0.6 - ratios(plan)["macs"]
    assert gap > 0.01
    assert f"the result lies {100 * gap:.1f} % of the whole network below it (multiple_of=4, 2 groups)" in str(
        caught[0].message
    )
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")
def test_a_group_without_scores_stays_whole(plain: ChannelMap) -> None:
    plan = attrim.allocate(plain, Scores({"conv2": range(12)}, "half"), Budget(macs=0.7))
    assert widths(plan)["conv1"] == 8
    assert widths(plan)["conv2"] < 12
