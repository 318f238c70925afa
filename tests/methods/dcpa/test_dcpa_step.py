"""What a step of the search costs beside a plain training step."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import attrim
from attrim.methods.dcpa.options import DcpaOptions
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.steps import PolicyStep, WeightStep
from attrim.methods.dcpa.supernet import Supernet
from attrim.methods.dcpa.watch import Watched
from attrim.methods.dcpa.widths import make_space
from attrim.modules.batches import read_batch
from attrim.modules.gates.places import find_places
from attrim.recover.engine import Engine, Student
from attrim.recover.feed import Portion
from attrim.recover.objective import Objective
from attrim.recover.recipe import Recipe
from attrim.search.limits import limits_of
from nets import Residual


def median(step: Callable[[], object], count: int = 7) -> float:
    step()
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return sorted(times)[count // 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["se", "xattn", "free"])
def test_a_step_of_the_search_takes_at_most_half_as_long_again(kind: str) -> None:
    torch.manual_seed(0)
    model, device = Residual((16, 32, 64), 3, 10), torch.device("cpu")
    batch = read_batch((torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))), device)
    x, y = batch.args[0], batch.labels
    channels, budget = attrim.trace(model, x[:1]), attrim.Budget(macs=0.5)
    places = find_places(model, channels, point="post", groups=None, policy="internal", run=lambda: model(x[:2])).places
    space = make_space(channels, places, budget, drop=True)
    ranks = torch.cat([torch.arange(channels[g].size) for g in space.groups])
    policy = Policy(space, Prices(space, limits_of(channels.cost, budget)), ranks, kind)  # type: ignore[arg-type]
    supernet, watched, objective = Supernet(model, space), Watched(places, space), Objective(Recipe(), None)
    learn = WeightStep(model, Student(model), supernet, policy, watched, objective, Engine(device))
    decide = PolicyStep(model, supernet, policy, objective, DcpaOptions(), Engine(device))
    sgd, adam = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), torch.optim.Adam(policy.parameters())
    generator, portion = torch.Generator().manual_seed(0), Portion(batch, 64)

    def plain() -> None:
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()

    def weights() -> None:
        sgd.zero_grad()
        learn(portion, policy.steady(policy.sample(1.0, generator)), 0.0)
        sgd.step()

    def widths() -> None:
        decide(portion, policy.sample(1.0, generator), 0.0, 0.0)
        adam.step()

    with watched.reading(model):
        usual = median(plain)
        assert median(weights) <= 1.5 * usual
        assert median(widths) <= 1.5 * usual
