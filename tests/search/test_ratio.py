"""Ratio searches on an objective whose optimum is known to be uneven: repeatable, within the budget, better than chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from test_space import network

from attrim import Budget, Scores
from attrim.errors import InputError
from attrim.search.neighbourhood import neighbourhood_with
from attrim.search.protocol import one_by_one, optimise
from attrim.search.ratio import SEARCHES, start_of
from attrim.search.space import Space
from attrim.search.starts import sensitivity, threshold, uniform
from nets import random_scores


@pytest.fixture(scope="module")
def space() -> Space:
    """The 27 inner groups of ResNet-56 at half of the MACs."""
    import attrim

    channels = attrim.trace(network("resnet56")[0], torch.zeros(1, 3, 32, 32))
    inner = [g for g in channels if g.id.endswith(".conv1")]
    assert len(inner) == 27
    return Space.of(channels, Scores({g.id: torch.rand(g.size) for g in inner}, "r"), Budget(macs=0.5))


@pytest.fixture(scope="module")
def concave(space):
    """Cutting costs more and more, in some groups much more than in others."""
    weights = np.random.default_rng(1).lognormal(0, 1, len(space))
    return lambda kept: -float((weights * (1 - space.ratios(kept)) ** 2).sum())


def run(name, space, objective, seed=0, evaluations=300, start=uniform, **options):
    return optimise(
        SEARCHES[name](space, start, seed), one_by_one(objective), space, evaluations=evaluations, **options
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_neighbourhood_beats_random_search_and_both_beat_uniform(space, concave, seed) -> None:
    flat = run("uniform", space, concave)
    chance = run("random", space, concave, seed)
    found = run("neighbourhood", space, concave, seed)
    assert len(flat.trials) == 1
    assert len(found.trials) == len(chance.trials) == 300
    assert flat.value < chance.value - 0.3 < found.value - 1.8
    assert found.value == max(found.curve) == found.curve[-1]


@pytest.mark.parametrize("name", ["bee", "evolution"])
def test_populations_beat_random_search(space, concave, name) -> None:
    assert run(name, space, concave).value > run("random", space, concave).value + 0.5


@pytest.mark.parametrize("name", list(SEARCHES))
def test_every_search_repeats_itself_keeps_the_budget_and_asks_nothing_twice(space, concave, name) -> None:
    asked = []

    def objective(kept):
        asked.append(kept)
        return concave(kept)

    first = run(name, space, objective, seed=5, evaluations=45)
    assert run(name, space, concave, seed=5, evaluations=45) == first
    assert len(set(asked)) == len(asked) == len(first.trials) == (1 if name in ("uniform", "global") else 45)
    cost = space.cost
    for trial in first.trials:
        if name == "nsga2":  # a front reaches to both sides of the budget
            assert trial.feasible == (cost.macs(trial.kept) <= 0.5 * cost.macs())
            continue
        assert trial.feasible
        assert 0.495 * cost.macs() <= cost.macs(trial.kept) <= 0.5 * cost.macs()
        assert trial.kept[0] == 16
    assert first.value == max(t.value for t in first.trials if t.feasible)
    if len(first.trials) > 1:
        assert run(name, space, concave, seed=6, evaluations=45).trials != first.trials


def test_starts(residual) -> None:
    scores = random_scores(residual)
    space = Space.of(residual, scores, Budget(macs=0.5))
    flat = run("uniform", space, lambda kept: 0.0)
    assert np.ptp(space.ratios(flat.best)) < 0.1
    low = scores.values["layers.0.conv1"] * 0.01
    ranked = run(
        "global", space, lambda kept: 0.0, start=threshold(Scores({**scores.values, "layers.0.conv1": low}, "r"))
    )
    number = residual.cost.groups.index("layers.0.conv1")
    assert ranked.best[number] == space.floors[number]
    assert space.fits(ranked.best)
    for name in ("uniform", "global", "sensitivity"):
        assert space.fits(
            run("neighbourhood", space, lambda kept: 0.0, start=start_of(name, scores), evaluations=40).best
        )


def test_sensitivity_probes_every_group_once_and_keeps_most_of_the_most_sensitive(space, concave) -> None:
    found = run("uniform", space, concave, start=sensitivity())
    probes = found.trials[:-1]
    assert len(probes) == 27
    assert not any(t.feasible for t in probes)
    assert found.trials[-1].kept == found.best
    assert found.value > run("uniform", space, concave).value + 1
    worst = int(np.argmin([t.value for t in probes]))
    assert space.ratios(found.best)[worst] == space.ratios(found.best).max()
    with pytest.raises(InputError, match="none of the 5 evaluated candidates keeps the budget"):
        run("uniform", space, concave, start=sensitivity(), evaluations=5)


def test_known_values_play_a_search_again(space, concave) -> None:
    """What a resumed search does: an objective that remembers, and the same seed."""
    whole = run("neighbourhood", space, concave, seed=3, evaluations=80)
    short = run("neighbourhood", space, concave, seed=3, evaluations=33)
    assert whole.trials[:33] == short.trials


def test_a_small_space_ends_early(plain) -> None:
    space = Space.of(plain, random_scores(plain), Budget(macs=0.5))
    for name in ("neighbourhood", "random", "bee", "evolution"):
        found = run(name, space, lambda kept: float(kept[0]), evaluations=2_000)
        assert 1 < len(found.trials) < 100


def test_hopeless_candidates_and_reports(space) -> None:
    told = []
    found = run(
        "random", space, lambda kept: math.nan if kept[1] < 8 else float(kept[1]), evaluations=30,
        on_trial=lambda number, trial, best: told.append((number, trial, best)),
    )  # fmt: skip
    assert [number for number, _, _ in told] == list(range(1, 31))
    assert [trial for _, trial, _ in told] == list(found.trials)
    assert any(trial.value == -math.inf for trial in found.trials)
    assert told[-1][2].kept == found.best
    assert found.value >= 8


@pytest.mark.parametrize(("siblings", "groups"), [(1, 2), (3, 2), (4, 3), (5, 2)])
def test_neighbours_share_their_first_change_and_keep_the_budget(space, siblings, groups) -> None:
    search = neighbourhood_with(siblings=siblings, groups=groups)(space, uniform, 5)
    here = search.send(None)[0]
    batch = search.send([0.0])
    assert len(batch) == len(set(batch)) == 10
    assert all(space.fits(point) for point in batch)
    changes = []
    for point in batch:
        different = [i for i in space.free.tolist() if point[i] != here[i]]
        assert 1 < len(different) <= groups
        changes.append((different[0], point[different[0]]))
    runs = [len(list(same)) for _, same in itertools.groupby(changes)]
    assert max(runs) == siblings or (siblings == 1 and max(runs) <= 2)
    assert sum(runs) == 10
    assert len(runs) >= -(-10 // siblings)


def test_wrong_settings(space, concave) -> None:
    for wrong in (0, True, 2.5):
        with pytest.raises(InputError, match="evaluations: expected an int >= 1"):
            run("random", space, concave, evaluations=wrong)
    with pytest.raises(InputError, match="0 < finest <= delta <= 1"):
        neighbourhood_with(delta=2)
    with pytest.raises(InputError, match="siblings >= 1"):
        neighbourhood_with(siblings=0)
    with pytest.raises(InputError, match=r"keep and strength in \(0, 1\)"):
        sensitivity(keep=1)
