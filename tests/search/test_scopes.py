"""What the scopes mean: one ranking, one ratio, or one share for groups of one structure; and how ties are broken."""

from __future__ import annotations

from typing import Any

import pytest

import attrim
from attrim import Budget, ChannelMap, PruningPlan, Scores
from nets import random_scores


def plan_of(channels: ChannelMap, scores: Scores, /, **limits: Any) -> PruningPlan:
    return attrim.allocate(channels, scores, Budget(**limits))


def widths(plan: PruningPlan) -> list[int]:
    return [note["kept"] for note in plan.groups.values()]


def favoured(channels: ChannelMap, position: int) -> Scores:
    """Rising scores in every group; one group is worth a hundred more."""
    return Scores(
        {g.id: [c + (100.0 if i == position else 0.0) for c in range(g.size)] for i, g in enumerate(channels)}, "favour"
    )


def equal(channels: ChannelMap) -> Scores:
    return Scores({g.id: [1.0] * g.size for g in channels}, "equal")


def test_global_scope_ranks_all_channels_together(chain: ChannelMap) -> None:
    kept = widths(plan_of(chain, favoured(chain, 2), channels=0.5))
    assert kept[2] == 8
    assert sum(kept) == 32
    assert max(kept[:2] + kept[3:]) - min(kept[:2] + kept[3:]) <= 1


def test_global_scope_removes_exactly_the_lowest_scores(chain: ChannelMap) -> None:
    scores = random_scores(chain, 2)
    kept = widths(plan_of(chain, scores, channels=0.75, min_keep=1))
    everything = sorted(float(v) for values in scores.values.values() for v in values)
    threshold = everything[16]
    assert kept == [int((values >= threshold).sum()) for values in scores.values.values()]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_group_scope_keeps_the_same_number_in_groups_of_one_size(chain: ChannelMap, share: float) -> None:
    assert widths(plan_of(chain, favoured(chain, 2), channels=share, scope="group")) == [int(8 * share)] * 8


@pytest.mark.parametrize("share", [0.3, 0.45, 0.55, 0.6, 0.8])
@pytest.mark.parametrize("position", [0, 2])
def test_group_scope_keeps_the_same_ratio_in_every_group(chain: ChannelMap, share: float, position: int) -> None:
    kept = widths(plan_of(chain, favoured(chain, position), channels=share, scope="group"))
    assert sum(kept) == int(64 * share)
    assert max(kept) - min(kept) <= 1


def test_group_scope_keeps_the_same_ratio_in_groups_of_different_sizes(residual: ChannelMap) -> None:
    for scores in (random_scores(residual), favoured(residual, 0), equal(residual)):
        plan = plan_of(residual, scores, macs=0.4, scope="group")
        notes = plan.groups.values()
        low = max((note["kept"] - 1.5) / note["size"] for note in notes)  # half a channel by rounding, one given back
        high = min((note["kept"] + 1.5) / note["size"] for note in notes)
        assert low <= high, [(note["kept"], note["size"]) for note in notes]


def test_isomorphic_scope_shares_by_structure_and_ranks_within_it(residual: ChannelMap) -> None:
    scores = favoured(residual, list(residual.groups).index("layers.1.conv1"))
    plan = plan_of(residual, scores, channels=0.6, scope="isomorphic", min_keep=1)
    kept: dict[str, int] = {}
    size: dict[str, int] = {}
    for group in residual:
        kept[group.kind] = kept.get(group.kind, 0) + plan.groups[group.id]["kept"]
        size[group.kind] = size.get(group.kind, 0) + group.size
    assert len(kept) > 2
    for kind in kept:
        assert abs(kept[kind] / size[kind] - 0.6) <= 1.5 / size[kind] + 0.01
    assert plan.groups["layers.1.conv1"]["kept"] == 16  # the best of its kind
    assert residual["layers.0.conv1"].kind == residual["layers.1.conv1"].kind
    assert plan.groups["layers.0.conv1"]["kept"] < 16


def test_isomorphic_scope_with_one_kind_is_the_global_one(chain: ChannelMap) -> None:
    scores = random_scores(chain)
    one = plan_of(chain, scores, channels=0.5, scope="isomorphic")
    assert widths(one) == widths(plan_of(chain, scores, channels=0.5))


@pytest.mark.parametrize("scope", ["global", "group", "isomorphic"])
def test_ties_are_broken_by_index(chain: ChannelMap, scope: Any) -> None:
    plan = plan_of(chain, equal(chain), channels=0.5, scope=scope)
    assert widths(plan) == [4] * 8
    for group in chain:
        member = group.members[0]
        assert plan.cuts[member.axis.tensor].keep[member.axis.dim] == (0, 1, 2, 3)


def test_scores_of_another_scale_change_nothing_where_only_order_counts(chain: ChannelMap) -> None:
    scores = random_scores(chain)
    scaled = Scores({g: 1000 * v + 7 for g, v in scores.values.items()}, "random")
    for scope in ("global", "group", "isomorphic"):
        first, second = (plan_of(chain, s, channels=0.4, scope=scope) for s in (scores, scaled))
        assert first.cuts == second.cuts
