"""Causes for which removing a channel is more than zeroing it at every consumer; everything else is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from nets import filled, image, kept_at_random


class Step(nn.Module):
    """A linear layer, an operation on its eight channels, and a head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.before, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        if name in LAYERS:
            self.layer = LAYERS[name]()
        if name == "attention scale":
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.name in LAYERS:
            first = isinstance(self.layer, (nn.GroupNorm, nn.BatchNorm1d, nn.InstanceNorm1d))
            x = self.layer(x.transpose(1, 2)).transpose(1, 2) if first else self.layer(x)
        elif self.name == "attention scale":
            q, k, v = (f(x).unsqueeze(1) for f in (self.query, self.key, self.value))
            x = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        else:
            x = FUNCTIONS[self.name](x)
        return self.head(x.relu())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(8),
    "layer norm without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(8),
    "one group": lambda: nn.GroupNorm(1, 8),
    "two groups": lambda: nn.GroupNorm(2, 8),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "batch norm": lambda: nn.BatchNorm1d(8),
    "instance norm": lambda: nn.InstanceNorm1d(8, affine=True),
    "prelu": lambda: nn.PReLU(),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "max": lambda x: x * x.amax(-1, keepdim=True),
    "variance": lambda x: x / (1 + x.var(-1, keepdim=True)),
    "softmax": lambda x: x.softmax(-1),
    "width": lambda x: x * x.shape[-1],
    "root of the width": lambda x: x / x.shape[-1] ** 0.5,
    "sum": lambda x: x * x.sum(-1, keepdim=True),
    "norm": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "tokens": lambda x: x * x.mean(1, keepdim=True),
}

INEXACT = {
    "layer norm": "layer norm statistics",
    "layer norm without weights": "layer norm statistics",
    "rms norm": "mean over channels",
    "one group": "group norm statistics",
    "two groups": "group norm statistics",
    "weight norm": "weight norm",
    "attention scale": "attention scale",
    "mean": "mean over channels",
    "max": "amax over channels",
    "variance": "var over channels",
    "softmax": "softmax over channels",
    "width": "a number computed from the width at ",
    "root of the width": "a number computed from the width at ",
}

EXACT = ("batch norm", "instance norm", "prelu", "sum", "norm", "normalize", "tokens")


@pytest.mark.parametrize(("name", "cause"), INEXACT.items(), ids=INEXACT)
def test_inexact_steps_name_their_cause_and_the_proof_lists_it(name: str, cause: str) -> None:
    model, example = filled(Step(name)), image(2, 7, 5)
    channels = attrim.trace(model, example)
    inexact = {g.id: g.effects for g in channels if not g.exact}
    expected = "query" if name == "attention scale" else "before"
    assert list(inexact) == [expected]
    (effect,) = inexact[expected]
    assert effect.startswith(cause)
    assert f"inexact: {effect}" in channels.explain(f"{expected}.weight:0")
    plan = attrim.plan_from_kept(channels, {expected: [0, 1, 2]})
    check = attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert (check.ok, check.exact) == (True, False)
    assert check.effects == {effect: (f"{expected}.weight:0",)}
    assert check.exact_error < 1e-12 < check.max_error
    assert str(check).startswith(f"ok: inexact by {effect} (1 groups); the exact part differs by ")
    assert plan.groups[expected]["exact"] is False


@pytest.mark.parametrize("name", EXACT)
def test_exact_steps_have_no_cause_and_no_error(name: str) -> None:
    model, example = filled(Step(name)), image(2, 7, 5)
    channels = attrim.trace(model, example)
    assert {g.id: (g.size, g.effects, g.exact) for g in channels} == {"before": (8, (), True)}
    for seed in range(3):
        plan = kept_at_random(channels, seed)
        check = attrim.verify(model, attrim.apply(model, plan), plan, example)
        assert (check.ok, check.exact, check.effects) == (True, True, {})
        assert check.max_error < 1e-12


def test_the_line_of_a_number_computed_from_the_width_is_given() -> None:
    (group,) = attrim.trace(filled(Step("width")), image(2, 7, 5))
    path, line = group.effects[0].removeprefix("a number computed from the width at ").rsplit(":", 1)
    assert path.endswith("trace/test_effects.py")
    assert int(line) == FUNCTIONS["width"].__code__.co_firstlineno


def test_places_of_a_group_norm_are_tied_across_its_groups() -> None:
    (group,) = attrim.trace(filled(Step("two groups")), image(2, 7, 5))
    assert (group.size, group.members[0].index.tolist()) == (4, [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_whole_groups_of_a_group_norm_go_exactly() -> None:
    class Groups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.norm, self.head = nn.Conv2d(3, 12, 1), nn.GroupNorm(6, 12), nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.before(x)).relu())

    model = filled(Groups())
    (group,) = channels = attrim.trace(model, image())
    assert (group.size, group.effects, group.members[0].index.tolist()[1]) == (6, (), [2, 3])
    plan = attrim.plan_from_kept(channels, {"before": [1, 4]})
    small = attrim.apply(model, plan)
    assert (small.norm.num_groups, small.norm.num_channels) == (2, 4)
    assert attrim.verify(model, small, plan, image()).max_error < 1e-12


def test_of_several_groups_only_the_one_concerned_is_inexact() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm, self.head = (
                nn.Linear(5, 8),
                nn.Linear(8, 6),
                nn.LayerNorm(6),
                nn.Linear(6, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.second(self.first(x).relu())))

    model, example = filled(Mixed()), image(4, 5)
    channels = attrim.trace(model, example)
    assert {g.id: g.effects for g in channels} == {"first": (), "second": ("layer norm statistics",)}
    only_exact = attrim.plan_from_kept(channels, {"first": [0, 1, 2]})
    check = attrim.verify(model, attrim.apply(model, only_exact), only_exact, example)
    assert (check.ok, check.exact, check.effects) == (True, True, {})
    assert torch.equal(attrim.apply(model, only_exact).second.weight, model.second.weight[:, :3])
