"""Every way to call a model and to return from it: tuples, dicts, several outputs, nested containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import attrim
from nets import filled, image, kept_at_random


class TwoInputs(nn.Module):
    """An image and tokens meet; the number scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.embed = nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, tokens: Tensor, scale: float = 1.0) -> Tensor:
        return self.head((self.conv(image).mean((2, 3)) + self.embed(tokens)).relu() * scale)


TOKENS = image(2, 4, seed=5)


@pytest.mark.parametrize(
    "example",
    [
        (image(), TOKENS),
        [image(), TOKENS],
        (image(), TOKENS, 0.5),
        {"tokens": TOKENS, "image": image()},
        {"image": image(), "tokens": TOKENS, "scale": 2.0},
    ],
    ids=["tuple", "list", "tuple with a number", "dict", "dict with a number"],
)
def test_positional_and_keyword_inputs(example: Any) -> None:
    model = filled(TwoInputs())
    channels = attrim.trace(model, example)
    assert [str(m.axis) for m in channels["conv"].members] == [
        "conv.weight:0", "conv.bias:0", "embed.weight:0", "embed.bias:0", "head.weight:1",
    ]  # fmt: skip
    plan = attrim.plan_from_kept(channels, {"conv": [0, 3, 7]})
    small = attrim.apply(model, plan)
    check = attrim.verify(model, small, plan, example)
    assert (check.ok, check.exact) == (True, True)
    assert check.max_error < 1e-12
    assert small(image(), TOKENS).shape == (2, 5)


class Nested(nn.Module):
    """Takes a list inside a dict inside a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, batch: dict[str, Any], *rest: Tensor) -> Tensor:
        first, (second, _) = batch["pair"][0], rest
        return self.c((self.a(first) + self.b(second)).relu())


def test_tensors_inside_nested_arguments_are_found() -> None:
    model = filled(Nested())
    channels = attrim.trace(model, ({"pair": [TOKENS, "name"]}, TOKENS, TOKENS))
    assert [str(m.axis) for m in channels["a"].members] == [
        "a.weight:0", "a.bias:0", "b.weight:0", "b.bias:0", "c.weight:1",
    ]  # fmt: skip


class Pair(NamedTuple):
    first: Tensor
    rest: list[Tensor]


@dataclass
class Record:
    first: Tensor
    rest: dict[str, Tensor]


class Holder:
    """A plain object, as detection models return."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


RESULTS = {
    "tuple": lambda a, b: (a, b),
    "list in tuple": lambda a, b: ([a], (b, None)),
    "dict": lambda a, b: {"a": a, "inner": {"b": b}},
    "named tuple": lambda a, b: Pair(a, [b]),
    "dataclass": lambda a, b: Record(a, {"b": b}),
    "object": Holder,
}


class Outputs(nn.Module):
    """One trunk, two heads, and a result of some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x).relu()
        return RESULTS[self.form](self.a(x), self.b(x))


@pytest.mark.parametrize("form", RESULTS)
def test_every_output_is_pinned_and_compared(form: str) -> None:
    model = filled(Outputs(form))
    channels = attrim.trace(model, image())
    assert {g.id: g.size for g in channels} == {"trunk": 8}
    pinned = {str(p.axis): p.reason.text for p in channels.pinned}
    assert pinned["a.weight:0"] == pinned["b.weight:0"] == pinned["b.bias:0"] == "is an output of the network"
    plan = kept_at_random(channels)
    small = attrim.apply(model, plan)
    assert attrim.verify(model, small, plan, image()).max_error < 1e-12
    with torch.no_grad():
        small.b.weight.mul_(1.001)
    check = attrim.verify(model, small, plan, image())
    assert not check.ok
    assert 1e-5 < check.max_error < 1e-2


def test_an_activation_that_is_also_an_output_stays() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x)
            return x.relu(), self.b(x)

    channels = attrim.trace(filled(Early()), image())
    assert len(channels) == 0
    assert "dim 0 (8): all pinned: is an output of the network" in channels.explain("a.weight:0")


def test_modules_inside_containers_have_their_dotted_names() -> None:
    class Containers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleDict({"stem": nn.Conv2d(3, 6, 1), "body": nn.ModuleList([nn.Conv2d(6, 9, 1)])})
            self.tail = nn.Sequential(nn.Sequential(nn.Conv2d(9, 7, 1), nn.ReLU()), nn.Conv2d(7, 2, 1))
            self.gains = nn.ParameterList([nn.Parameter(torch.ones(6, 1, 1))])

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.steps["body"][0](self.steps["stem"](x) * self.gains[0]))

    channels = attrim.trace(filled(Containers()), image())
    assert {g.id: g.size for g in channels} == {"steps.stem": 6, "steps.body.0": 9, "tail.0.0": 7}
    assert "gains.0:0" in {str(m.axis) for m in channels["steps.stem"].members}
