"""The three ranking losses: against their formulas term by term, their gradients, and what leaves them as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attrim.errors import InputError
from attrim.methods.globalpru import Ranking
from attrim.methods.globalpru.losses import hinge_loss, listwise_loss, pairwise_loss

FORMS = ("pairwise", "listwise", "hinge")


def scores(rows: int = 4, size: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(size: int = 7, seed: int = 1) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("omega", [0.0, 4.0])
@pytest.mark.parametrize("kept", [1, 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_pairwise_loss_is_its_formula(omega: float, kept: int, temperature: float) -> None:
    s, pi = scores(), order().tolist()
    total = weights = 0.0
    for i in range(7):
        for j in range(i + 1, 7):
            w = 1 + omega * (i < kept <= j)
            weights += w
            for row in s.tolist():
                total += w * math.log1p(math.exp(-(row[pi[i]] - row[pi[j]]) / temperature)) / len(s)
    found = Ranking(omega=omega, temperature=temperature)(s, torch.tensor(pi), kept)
    assert float(found) == pytest.approx(total / weights, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_listwise_loss_is_minus_the_log_probability_of_the_order(temperature: float) -> None:
    """Plackett-Luce: the channels are drawn one after the other, each with a chance in proportion to exp(score)."""
    s, pi = scores(), order().tolist()
    total = 0.0
    for row in s.tolist():
        weight = [math.exp(row[c] / temperature) for c in pi]
        for k in range(7):
            total -= math.log(weight[k] / sum(weight[k:])) / 7 / len(s)
    assert float(Ranking(form="listwise", temperature=temperature)(s, torch.tensor(pi), 3)) == pytest.approx(total)


def test_the_hinge_loss_is_its_formula() -> None:
    s, pi = scores(), order().tolist()
    terms = [max(0.0, 0.3 - (row[pi[k]] - row[pi[k + 1]])) for row in s.tolist() for k in range(6)]
    found = Ranking(form="hinge", margin=0.3)(s, torch.tensor(pi), 3)
    assert float(found) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [1, 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gradients_are_those_of_finite_differences(form: Any, kept: int, temperature: float) -> None:
    ranking, pi = Ranking(form=form, temperature=temperature), order()
    assert torch.autograd.gradcheck(lambda s: ranking(s, pi, kept), (scores().requires_grad_(),), atol=1e-7)


def test_the_pairwise_gradient_is_minus_w_sigmoid_for_each_pair() -> None:
    s = scores(rows=1).requires_grad_()
    Ranking(temperature=0.5)(s, torch.arange(7), 3).backward()
    expected = torch.zeros(7, dtype=torch.float64)
    weights = 0.0
    for i in range(7):
        for j in range(i + 1, 7):
            w = 1 + 4.0 * (i < 3 <= j)
            weights += w
            pull = w * torch.sigmoid(-(s[0, i] - s[0, j]) / 0.5).detach() / 0.5
            expected[i] -= pull
            expected[j] += pull
    assert s.grad is not None
    assert torch.allclose(s.grad[0], expected / weights, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_on_all_scores_of_a_sample_changes_nothing(form: Any) -> None:
    ranking, pi, s = Ranking(form=form), order(), scores()
    shift = torch.tensor([[3.0], [-70.0], [0.1], [500.0]], dtype=torch.float64)
    first, second = s.clone().requires_grad_(), (s + shift).requires_grad_()
    one, two = ranking(first, pi, 3), ranking(second, pi, 3)
    one.backward()
    two.backward()
    assert first.grad is not None
    assert torch.allclose(one, two, rtol=1e-11)
    assert torch.allclose(first.grad, second.grad, atol=1e-11)
    assert torch.allclose(first.grad.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_right_order_with_room_costs_least_and_huge_scores_stay_finite(form: Any) -> None:
    ranking, pi = Ranking(form=form), order()
    right = torch.empty(1, 7, dtype=torch.float64)
    right[0, pi] = torch.arange(7, 0, -1, dtype=torch.float64) * 40
    assert float(ranking(right, pi, 3)) < 1e-12
    assert float(ranking(-right, pi, 3)) > 10
    assert bool(torch.isfinite(ranking(right.float() * 1e4, pi, 3)))
    single = torch.ones(3, 1, requires_grad=True)
    loss = ranking(single, torch.tensor([0]), 1)
    loss.backward()
    assert loss.item() == 0.0
    assert single.grad is not None
    assert not bool(single.grad.any())


@pytest.mark.parametrize("form", FORMS)
def test_a_fixed_batch_is_ordered_by_descent(form: Any) -> None:
    ranking, pi, s = Ranking(form=form), order(), scores(rows=8).requires_grad_()
    losses = []
    for _ in range(400):
        loss = ranking(s, pi, 3)
        (gradient,) = torch.autograd.grad(loss, s)
        with torch.no_grad():
            s -= 5.0 * gradient
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(row.argsort(descending=True), pi) for row in s)


def test_a_pair_across_the_cut_is_put_right_first() -> None:
    """With omega, a sample gains more from the pair across the cut than from an equal one on one side."""
    swapped_across = torch.tensor([[4.0, 2.0, 3.0, 1.0]])
    swapped_inside = torch.tensor([[3.0, 4.0, 2.0, 1.0]])
    assert pairwise_loss(swapped_across, 2, omega=4.0) > pairwise_loss(swapped_inside, 2, omega=4.0)
    assert float(pairwise_loss(swapped_across, 2, omega=0.0)) == pytest.approx(
        float(pairwise_loss(swapped_inside, 2, omega=0.0))
    )


@pytest.mark.parametrize("kept", [1, 60, 150])
@pytest.mark.parametrize("omega", [0.0, 4.0])
def test_drawn_pairs_have_the_right_expectation(kept: int, omega: float, monkeypatch: pytest.MonkeyPatch) -> None:
    s = scores(rows=2, size=150)
    torch.manual_seed(0)
    drawn = torch.stack([pairwise_loss(s, kept, omega=omega, pairs=4096) for _ in range(50)])
    monkeypatch.setattr("attrim.methods.globalpru.losses.ALL_PAIRS", 1000)
    whole = pairwise_loss(s, kept, omega=omega)
    spread = float(drawn.std() / 50**0.5)
    assert abs(float(drawn.mean() - whole)) < 4 * spread
    assert float(drawn.std()) < 0.05 * float(whole)


def test_drawn_pairs_repeat_with_the_seed_and_give_every_channel_a_gradient() -> None:
    s = scores(rows=2, size=200).requires_grad_()
    gradients = []
    for _ in range(2):
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad(Ranking()(s, order(200), 80), s)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert bool((gradients[0] != 0).all())


def test_the_functions_take_scores_in_order() -> None:
    s = scores()
    assert float(listwise_loss(s)) == float(Ranking(form="listwise")(s, torch.arange(7), 3))
    assert float(hinge_loss(s)) == float(Ranking(form="hinge")(s, torch.arange(7), 3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"form": "bpr"}, "form: expected one of pairwise, listwise, hinge, found 'bpr'"),
        ({"temperature": 0}, "temperature: expected a number > 0, found 0"),
        ({"omega": -1}, "omega: expected a number >= 0, found -1"),
        ({"margin": float("nan")}, "margin: expected a number > 0"),
        ({"pairs": 1}, "pairs: expected an int > 1, found 1"),
        ({"pairs": True}, "pairs: expected an int > 1, found True"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Ranking(**options)
