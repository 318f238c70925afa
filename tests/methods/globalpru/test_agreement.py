"""Monitors against loops, masks against a masked forward pass, scores and allocation against their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from some import setting

import attrim
from attrim import Budget, Scores
from attrim.errors import BudgetError, InputError
from attrim.methods.globalpru import measure_agreement, measure_masks
from attrim.methods.globalpru.masks import masked
from attrim.methods.globalpru.scores import Reader, attention_scores, non_increasing, place_scores, plan_of_orders
from nets import Plain, Residual

KEPT = {"conv1": 3, "conv2": 5}


def orders() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"conv1": torch.randperm(8, generator=generator), "conv2": torch.randperm(12, generator=generator)}


@pytest.mark.parametrize("ranked", ["logits", "attention"])
def test_monitors_are_what_loops_over_samples_and_pairs_give(ranked: Any) -> None:
    model, _, gates, data = setting()
    pi = orders()
    found = measure_agreement(model, gates, pi, KEPT, data, reader=Reader(ranked))
    images = torch.cat([x for x, _ in data])
    with torch.no_grad(), gates.attached(model) as collected:
        model(images)
        read = Reader(ranked).read(collected)
    for group, (scores, attention) in read.items():
        order, kept, size = pi[group].tolist(), KEPT[group], len(pi[group])
        taus, overlaps = [], []
        for row in scores.tolist():
            signs = [np.sign(row[order[i]] - row[order[j]]) for i, j in itertools.combinations(range(size), 2)]
            taus.append(sum(signs) / len(signs))
            mine = sorted(range(size), key=lambda c, row=row: -row[c])[:kept]
            overlaps.append(len(set(mine) & set(order[:kept])) / kept)
        assert found[group].tau == pytest.approx(np.mean(taus), abs=1e-12)
        assert found[group].overlap == pytest.approx(np.mean(overlaps), abs=1e-12)
        relative = attention.var(0, unbiased=False) / attention.mean(0) ** 2
        assert found[group].variance == pytest.approx(float(relative.mean()), rel=1e-9)


def test_tau_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    model, _, gates, data = setting()
    pi = orders()
    found = measure_agreement(model, gates, pi, KEPT, data)
    with torch.no_grad(), gates.attached(model) as collected:
        model(torch.cat([x for x, _ in data]))
        logits = collected.logits["conv2"][0]
    places = pi["conv2"].argsort()
    taus = [stats.kendalltau(row, -places.numpy()).statistic for row in logits.numpy()]
    assert found["conv2"].tau == pytest.approx(np.mean(taus), abs=1e-12)


def test_samples_of_one_mind_agree_fully_and_equal_scores_count_as_neither() -> None:
    model, _, gates, data = setting()
    with torch.no_grad():
        for unit in gates.units.values():
            unit.second.weight.zero_()  # attention is the bias, whatever the sample
    own = {g: gates.gate_of(gates.places[g][0]).second.bias.detach().argsort(descending=True) for g in gates.places}
    for found in measure_agreement(model, gates, own, KEPT, data).values():
        assert (found.tau, found.overlap) == (1.0, 1.0)
        assert found.variance == pytest.approx(0.0, abs=1e-12)
    for found in measure_agreement(model, gates, {g: o.flip(0) for g, o in own.items()}, KEPT, data).values():
        assert found.tau == -1.0
    with torch.no_grad():
        for unit in gates.units.values():
            unit.second.bias.zero_()
    assert {f.tau for f in measure_agreement(model, gates, own, KEPT, data).values()} == {0.0}


def test_watching_changes_nothing_and_stops_after_so_many_samples() -> None:
    model, _, gates, data = setting()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    read: list[int] = []

    def counted() -> Any:
        for batch in data:
            read.append(len(batch[0]))
            yield batch

    measure_agreement(model, gates, orders(), KEPT, counted(), samples=7)
    assert read == [6, 6]
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("shared", [True, False])
def test_masks_are_what_masking_layer_by_layer_gives(shared: bool) -> None:
    model, _, gates, data = setting()
    pi = orders()
    factors = {g: torch.ones(len(o), dtype=torch.float64) for g, o in pi.items()}
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    for group in ("conv1", "conv2"):
        pooled = {}

        def watch(place: Any, x: torch.Tensor, pooled: dict[str, torch.Tensor] = pooled) -> None:
            pooled[place.group] = x.mean((2, 3))

        with torch.no_grad(), gates.attached(model, fixed=factors, watch=watch):
            model(images)
            logits, attention = gates.gate_of(gates.places[group][0])(pooled[group])
        mask = torch.zeros_like(attention)
        for n, row in enumerate(logits.tolist()):
            chosen = pi[group].tolist() if shared else sorted(range(len(row)), key=lambda c, row=row: -row[c])
            mask[n, chosen[: KEPT[group]]] = 1
        factors[group] = attention * mask
    with torch.no_grad(), gates.attached(model, fixed=factors):
        expected = model(images)
    with torch.no_grad(), gates.attached(model), masked(gates, KEPT, pi if shared else None):
        outputs = model(images)
    assert torch.allclose(outputs, expected, atol=1e-12)
    found = measure_masks(model, gates, pi, KEPT, data)
    right = float((expected.argmax(1) == labels).double().mean())
    assert (found.shared if shared else found.own) == pytest.approx(right)
    with torch.no_grad(), gates.attached(model):
        assert found.open == pytest.approx(float((model(images).argmax(1) == labels).double().mean()))
    assert found.gap == found.own - found.shared


@pytest.mark.parametrize("network", [Plain, Residual])
def test_the_sliced_network_is_the_masked_one_where_attention_is_the_same_for_all(network: Any) -> None:
    """Folding is exact where W2 = 0: what is cut from the folded network is the gated one with its shared mask."""
    policy = "internal" if network is Plain else "tied"
    model, channels, gates, data = setting(network(), policy=policy)
    generator = torch.Generator().manual_seed(0)
    pi = {g: torch.randperm(channels[g].size, generator=generator) for g in gates.places}
    kept = {g: max(1, channels[g].size // 3) for g in gates.places}
    with torch.no_grad():
        for unit in gates.units.values():
            unit.second.weight.zero_()
    factors = {g: gates.features(model, data[0])[g][:, 0].mean(0) for g in pi}
    for g, places in gates.places.items():  # every branch of a stream with the same attention, as folding takes it
        for place in places:
            gates.gate_of(place).second.load_state_dict(gates.gate_of(places[0]).second.state_dict(), strict=True)
        factors[g] = gates.features(model, data[0])[g][0, 0]
    plan = attrim.plan_from_kept(channels, {g: pi[g][: kept[g]].numpy() for g in pi})
    small = attrim.apply(gates.fold(model, factors), plan)
    with torch.no_grad(), gates.attached(model), masked(gates, kept, pi):
        expected = model(data[0][0])
    assert torch.allclose(small(data[0][0]), expected, atol=1e-9, rtol=0)
    assert float(expected.std()) > 1e-3


def test_masks_leave_no_hook_behind() -> None:
    model, _, gates, data = setting()
    with pytest.raises(ZeroDivisionError), masked(gates, KEPT):
        _ = 1 / 0
    assert all(not unit._forward_hooks for unit in gates.units.values())
    assert measure_masks(model, gates, orders(), {"conv1": 8, "conv2": 12}, data).gap == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_non_increasing_is_isotonic_regression(seed: int) -> None:
    regression = pytest.importorskip("sklearn.isotonic").IsotonicRegression
    values = np.random.default_rng(seed).normal(size=40) - np.linspace(0, 2, 40)
    fitted = non_increasing(values)
    assert np.allclose(fitted, regression(increasing=False).fit_transform(np.arange(40), values), atol=1e-12)
    assert bool((np.diff(fitted) <= 0).all())


def test_scores_fall_along_the_order_also_where_the_attention_does_not() -> None:
    pi = orders()
    generator = torch.Generator().manual_seed(0)
    mean = {g: torch.rand(len(o), generator=generator) for g, o in pi.items()}
    mean["conv1"][:4] = 0.0
    for scores in (place_scores(pi), attention_scores(pi, mean)):
        for group, order in pi.items():
            assert scores[group].dtype == torch.float32
            assert scores[group].argsort(descending=True).tolist() == order.tolist()
            assert bool((scores[group][order].diff() < 0).all())
    relative = attention_scores({"a": torch.arange(3)}, {"a": torch.tensor([3.0, 2.0, 1.0])})["a"]
    assert torch.allclose(relative, torch.tensor([1.5, 1.0, 0.5]), atol=1e-6)
    dead = attention_scores({"a": torch.tensor([2, 0, 1])}, {"a": torch.zeros(3)})["a"]
    assert dead.argsort(descending=True).tolist() == [2, 0, 1]


def test_a_ratio_takes_the_same_share_of_every_group_and_minds_floors() -> None:
    _, channels, _, _ = setting()
    scores = Scores(place_scores(orders()), "globalpru")
    whole = plan_of_orders(channels, scores, "uniform", None, 0.0)
    assert not whole.cuts
    for ratio, expected in ((0.3, (6, 9)), (0.5, (4, 6)), (0.99, (1, 2))):
        plan = plan_of_orders(channels, scores, "uniform", None, ratio)
        assert tuple(plan.groups[g]["kept"] for g in ("conv1", "conv2")) == expected
        for group, order in orders().items():
            kept = plan.cuts[f"{group}.weight"].keep[0]
            assert set(kept) == set(order[: len(kept)].tolist())
    rules = Budget(channels=0.5, min_keep=0.5, multiple_of=4, frozen=("conv1.weight",))
    plan = plan_of_orders(channels, scores, "uniform", rules, 0.5)
    assert (plan.groups["conv1"]["kept"], plan.groups["conv2"]["kept"]) == (8, 8)
    with pytest.raises(BudgetError, match=r"in \[0, 1\), found 1"):
        plan_of_orders(channels, scores, "uniform", None, 1)
    with pytest.raises(InputError, match="how small"):
        plan_of_orders(channels, scores, "uniform", None, None)


def test_attention_takes_more_from_the_group_that_leans_on_few_channels() -> None:
    _, channels, _, _ = setting()
    pi = {"conv1": torch.arange(8), "conv2": torch.arange(12)}
    mean = {"conv1": torch.linspace(1.1, 0.9, 8), "conv2": torch.tensor([1.9] * 4 + [0.2] * 8)}
    scores = Scores(attention_scores(pi, mean), "globalpru")
    by_budget = plan_of_orders(channels, scores, "attention", Budget(channels=0.6), None)
    by_ratio = plan_of_orders(channels, scores, "attention", None, 0.4)
    for plan in (by_budget, by_ratio):
        assert (plan.groups["conv1"]["kept"], plan.groups["conv2"]["kept"]) == (8, 4)
    uniform = plan_of_orders(channels, scores, "uniform", Budget(channels=0.6), None)
    assert (uniform.groups["conv1"]["kept"], uniform.groups["conv2"]["kept"]) == (5, 7)
