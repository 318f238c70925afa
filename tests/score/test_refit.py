"""Backward elimination with the repair in mind: against a solver that fits anew after every step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import score
from attrim.errors import CriterionError
from nets import Mobile, Residual, image


class Pair(nn.Module):
    """``inner`` channels between two linear layers; the inputs of the second one are the data themselves."""

    def __init__(self, inner: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inner, inner, bias=False)
        self.second = nn.Linear(inner, outputs)
        nn.init.eye_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def fresh(model: nn.Module) -> nn.Module:
    """Random weights from a seed, batch-norm statistics of some data."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    with torch.no_grad():
        model.train()(image(16, 3, 8, 8, seed=9))
    return model.eval()


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    return torch.randn(rows, columns, generator=random, dtype=torch.float64) @ mix + 3


def least_error(x: Tensor, weight: Tensor, kept: list[int]) -> float:
    """Half the mean squared error of the best fit (with a constant) to the outputs from the kept inputs."""
    target = (x - x.mean(0)) @ weight.T
    seen = (x - x.mean(0))[:, kept]
    fitted = seen @ torch.linalg.lstsq(seen, target).solution
    return float((target - fitted).square().sum() / len(x) / 2)


def test_every_step_is_the_cheapest_and_costs_what_a_solver_says() -> None:
    torch.manual_seed(1)
    model = Pair(5, 3).double()
    x = correlated(64, 5)
    channels = attrim.trace(model, x[:2])
    (group,) = channels
    found = score(model, channels, "refit", [x], damping=1e-14, price="none").values[group.id].double()
    weight = model.second.weight.detach()
    kept, level, rises, order = list(range(5)), 0.0, [], []
    now = 0.0
    while len(kept) > 1:
        costs = {c: least_error(x, weight, [k for k in kept if k != c]) for c in kept}
        chosen = min(costs, key=lambda c: costs[c])
        level = max(level, costs[chosen] - now)
        now = costs[chosen]
        kept.remove(chosen)
        order.append(chosen)
        rises.append(level)
    whole = least_error(x, weight, [])
    rises.append(max(level, whole - now))
    order.append(kept[0])
    expected = torch.zeros(5, dtype=torch.float64)
    expected[order] = torch.tensor(rises, dtype=torch.float64)
    assert torch.allclose(found / found.max(), expected / expected.max(), rtol=1e-4)
    assert found.argsort().tolist() == order


def test_of_two_equal_channels_one_is_free_and_the_other_is_not() -> None:
    torch.manual_seed(0)
    model = Pair(4, 3).double()
    x = correlated(50, 4)
    x[:, 2] = x[:, 0]
    channels = attrim.trace(model, x[:2])
    (group,) = channels
    values = score(model, channels, "refit", [x], damping=1e-9).values[group.id]
    low, high = sorted([float(values[0]), float(values[2])])
    assert low < 1e-5
    assert high > 1e-3
    apart = score(model, channels, "obs", [x], damping=1e-9, centred=True, normalize="none").values[group.id]
    assert float(apart[[0, 2]].max()) < 1e-5 * float(apart.max())  # each by itself seems free


def test_batches_add_up() -> None:
    model = fresh(Residual((8, 12), 1))
    x = image(12, 3, 8, 8).double()
    model = model.double()
    channels = attrim.trace(model, x[:1])
    whole = score(model, channels, "refit", [x]).values
    parts = score(model, channels, "refit", list(torch.split(x, 5))).values
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], rtol=0.15, atol=1e-6), name  # the spread is read at other positions


def test_the_price_is_what_a_channel_costs() -> None:
    model = fresh(Residual((8, 12), 1))
    x = image(6, 3, 8, 8)
    channels = attrim.trace(model, x[:1])
    free, macs = (score(model, channels, "refit", [x], price=p).values for p in ("none", "macs"))
    ratios = []
    for group in channels:
        whole, less = channels.cost.macs(), channels.cost.macs({group.id: group.size - 1})
        ratios.append(float((free[group.id] / macs[group.id]).mean()) / (whole - less))
    assert np.allclose(ratios, ratios[0], rtol=1e-3)


def test_every_group_of_an_inverted_residual_is_scored() -> None:
    model = fresh(Mobile())
    x = image(4, 3, 8, 8)
    channels = attrim.trace(model, x[:1])
    values = score(model, channels, "refit", [x]).values
    assert set(values) == set(channels.groups)
    for a, b in itertools.pairwise(sorted(values)):
        assert values[a].isfinite().all()
        assert values[b].min() >= 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"price": "flops"}, "price: expected macs, params or none, found 'flops'"),
        ({"damping": -1}, "damping: expected a number >= 0, found -1"),
        ({"rounds": 0}, "rounds: expected an int >= 1, found 0"),
        ({"reduction": "max"}, "adds up the error of all consumers"),
    ],
)
def test_refused(options: dict[str, object], text: str) -> None:
    model = fresh(Residual((8, 12), 1))
    channels = attrim.trace(model, image(1, 3, 8, 8))
    with pytest.raises(CriterionError, match=text):
        score(model, channels, "refit", [image(4, 3, 8, 8)], **options)


def test_wide_groups_go_in_portions() -> None:
    model = Pair(24, 4).double()
    x = correlated(200, 24)
    channels = attrim.trace(model, x[:2])
    (group,) = channels
    one, portions = (score(model, channels, "refit", [x], rounds=r, price="none").values[group.id] for r in (24, 6))
    first = set(one.argsort()[:8].tolist())
    assert len(first & set(portions.argsort()[:8].tolist())) >= 5
