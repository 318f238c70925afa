"""Expected cost against sums over every network of the space, and against the cost model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import Dense, Made, Nested, made
from torch import Tensor, nn

import attrim
from attrim.methods.dcpa.objective import cost_term, entropy, entropy_weight
from nets import Attention, Mobile, Plain, Residual

ALL = attrim.Budget(macs=0.5, params=0.6, channels=0.7)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Plain(), {}),
        (Dense(), {}),
        (Residual((4, 6), 1), {}),
        (Residual((4, 6), 1), {"drop": True}),
        (Residual((4, 6), 1), {"share": "block"}),
    ],
)
def test_the_expectation_is_the_sum_over_all_networks(network: nn.Module, options: dict[str, object]) -> None:
    """Squares of one group (a stream on both sides of a layer) included."""
    m = made(network, budget=ALL, ratios=(0.4,), **options)
    with torch.no_grad():
        m.policy.theta.add_(torch.randn(m.policy.theta.shape, generator=torch.Generator().manual_seed(1)))
    m.policy.drop_steady = False
    assert torch.allclose(m.policy.expected(), over_all_networks(m, m.policy.logits().double().softmax(1)), rtol=1e-12)


def test_branches_count_in_full_until_they_are_likelier_to_go_than_to_stay() -> None:
    """The value is that of the decision, the gradient that of the probability."""
    m = made(Residual((4, 6), 1), budget=ALL, ratios=(0.4,), drop=True, kind="free")
    branches = [u for u, unit in enumerate(m.space.units) if unit.branch is not None]
    with torch.no_grad():
        m.policy.theta[branches[0], 0] += 5.0
    p = m.policy.logits().double().softmax(1).detach()
    for u in branches:
        gone = float(u == branches[0])
        p[u] = torch.cat([torch.tensor([gone]), (1 - gone) * p[u, 1:] / p[u, 1:].sum()])
    assert torch.allclose(m.policy.expected(), over_all_networks(m, p), rtol=1e-12)
    m.policy.expected()[0].backward()
    grad = m.policy.theta.grad
    assert grad is not None
    assert bool((grad[branches, 0] < 0).all())  # dropping either would be cheaper, the first one being out or not


def over_all_networks(m: Made, p: Tensor) -> Tensor:
    """Expected cost by going through all of them."""
    total = torch.zeros(3, dtype=torch.float64)
    for choice in itertools.product(*(range(len(u)) for u in m.space.units)):
        chance = torch.stack([p[u, k] for u, k in enumerate(choice)]).prod()
        kept, drops = m.space.kept(choice), m.space.drops(choice)
        cost = m.channels.cost
        total += chance * torch.tensor([cost.macs(kept, drops), cost.params(kept, drops), cost.channels(kept, drops)])
    return total


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_chosen_networks_cost_what_the_cost_model_says(data: st.DataObject) -> None:
    m = MOBILE
    choices = [[data.draw(st.integers(0, len(u) - 1)) for u in m.space.units] for _ in range(3)]
    found = m.prices.at(torch.tensor(choices))
    for choice, costs in zip(choices, found.tolist(), strict=True):
        kept, drops = m.space.kept(choice), m.space.drops(choice)
        assert costs == [
            f(kept, drops) for f in (m.channels.cost.macs, m.channels.cost.params, m.channels.cost.channels)
        ]


MOBILE = made(Mobile(), side=16, budget=ALL, drop=True)


def test_the_expectation_has_the_gradient_of_finite_differences() -> None:
    m = made(Residual((4, 6), 1), budget=ALL, drop=True, kind="free")
    policy = m.policy.double()
    assert torch.autograd.gradcheck(lambda theta: m.prices.expected(theta.softmax(1)) / m.prices.whole, (policy.theta,))


def test_moments_of_gated_channels_are_exact() -> None:
    m = made(Residual((4, 6), 1), budget=ALL, by_channel=True, drop=True, kind="free")
    with torch.no_grad():
        m.policy.open.copy_(torch.randn(m.policy.open.shape, generator=torch.Generator().manual_seed(2)))
    generator = torch.Generator().manual_seed(3)
    p, keep = m.policy.channel_logits().sigmoid(), m.policy.log_probabilities()[:, 1].exp()
    draws = torch.rand(20_000, len(p), generator=generator) < p
    stays = torch.rand(20_000, len(keep), generator=generator) < keep
    groups = m.space.gated
    offsets = [m.space.offsets[g] for g in groups]
    total = torch.zeros(3, dtype=torch.float64)
    for row, alive in zip(draws[:4000], stays[:4000], strict=True):
        counts = {g: int(row[o : o + m.channels[g].size].sum()) for g, o in zip(groups, offsets, strict=True)}
        drops = m.space.drops([int(a) for a in alive])
        cost = m.channels.cost
        total += torch.tensor([cost.macs(counts, drops), cost.params(counts, drops), cost.channels(counts, drops)])
    assert torch.allclose(m.policy.expected(), total / 4000, rtol=0.03)
    wide = made(Residual((4, 6), 1), budget=ALL, by_channel=True, kind="free")
    assert wide.policy.likeliest().tolist() == wide.prices.whole.tolist()


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("rule", "expected", "mode", "value"),
    [
        ("abslog", 80e6, 80e6, 0.6931471805599453),
        ("abslog", 20e6, 80e6, 0.6931471805599453),
        ("one_sided", 20e6, 80e6, 0.0),
        ("one_sided", 80e6, 0.0, 0.6931471805599453),
        ("tas", 80e6, 80e6, 0.6931471805599453),
        ("tas", 80e6, 30e6, -0.6931471805599453),
        ("tas", 80e6, 36e6, 0.0),
        ("dmcp", 39e6, 0.0, 0.0),
        ("dmcp", 37e6, 0.0, 1.0986122886681098),
        ("dmcp", 48e6, 0.0, 2.302585092994046),
        ("dmcp", 338e6, 0.0, 3.4011973816621555),
    ],
)
def test_cost_rules(rule: str, expected: float, mode: float, value: float) -> None:
    """Bound 40 million, whole network 100 million."""
    cost = one(expected)
    term = cost_term(rule, cost, one(mode), one(40e6).detach(), one(100e6).detach())  # type: ignore[arg-type]
    assert float(term.detach()) == pytest.approx(value)
    term.backward()
    assert cost.grad is not None
    assert bool(cost.grad.isfinite().all())


def test_of_several_limits_the_worst_counts() -> None:
    costs = torch.tensor([60.0, 80.0], requires_grad=True)
    bounds, whole = torch.tensor([50.0, 40.0]), torch.tensor([100.0, 100.0])
    cost_term("abslog", costs, costs, bounds, whole).backward()
    assert costs.grad is not None
    assert costs.grad.tolist() == [0.0, pytest.approx(1 / 80)]


def test_entropy_and_its_weight() -> None:
    flat = torch.full((3, 4), 0.25).log()
    assert float(entropy(flat)) == pytest.approx(1.3862943)
    assert float(entropy(torch.tensor([[0.0, -1e4]]))) == 0.0
    assert [entropy_weight(0.3, t) for t in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([0, 0, 0.15, 0.3])


def test_what_still_runs_without_a_branch_is_priced() -> None:
    """Attention has no module of its own: its product runs on, on zeros, when the layers around it are gone."""
    m = made(Heads(), budget=ALL, drop=True)
    choice = [0 if u.branch else len(u) - 1 for u in m.space.units]
    kept, drops = m.space.kept(choice), m.space.drops(choice)
    assert drops
    cost = m.channels.cost
    assert m.prices.at(torch.tensor([choice]))[0].tolist() == [
        f(kept, drops) for f in (cost.macs, cost.params, cost.channels)
    ]


class Heads(nn.Module):
    """Pixels as tokens, through one attention layer in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.fc = nn.Conv2d(3, 20, 1), Attention(), nn.Linear(5, 3)
        self.attention.embed = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.attention(tokens))


@pytest.mark.parametrize("by_channel", [False, True])
def test_branches_inside_branches_and_what_runs_on_without_them(by_channel: bool) -> None:
    m = made(Nested(), budget=ALL, drop=True, by_channel=by_channel, ratios=(0.5,))
    inside = {b.id: b.inside for b in m.channels.branches if b.gate}
    assert len(inside) >= 2
    assert any(inside.values())
    cost = m.channels.cost
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        choice = [int(torch.randint(len(u), (), generator=generator)) for u in m.space.units]
        kept, drops = m.space.kept(choice), m.space.drops(choice)
        one_hot = torch.nn.functional.one_hot(torch.tensor(choice), m.space.most).double()
        whole = m.policy._moments(torch.ones(len(m.policy.open), dtype=torch.float64)) if by_channel else None
        found = m.prices.expected(one_hot, whole).tolist()
        assert found == pytest.approx([f(kept, drops) for f in (cost.macs, cost.params, cost.channels)], rel=1e-12)
