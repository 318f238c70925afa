"""Operators without a rule pin what flows into them, and say which operator, in which module, at which line."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attrim
from nets import filled, image, kept_at_random


@torch.library.custom_op("attrim_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """Looks pointwise, and nobody can know."""
    return x * 2


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("attrim_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """Has no fake kernel either: the model has to run for real."""
    return x * 2


class Strange(nn.Module):
    """Runs a strange operator on channels."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return OPERATORS[self.name](x)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "aten._fft_c2c": lambda x: torch.fft.fft2(x).real,
    "attrim_tests.twist": lambda x: twist(x),
    "attrim_tests.opaque": lambda x: opaque(x),
    "aten._cdist_forward": lambda x: torch.cdist(x, x),
    "aten.complex": lambda x: torch.view_as_real(torch.complex(x, x))[..., 0],
}


class Around(nn.Module):
    """A strange operator between two convolutions, and an ordinary one after them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.before, self.inner = nn.Conv2d(3, 8, 1), nn.Sequential(Strange(name))
        self.after, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.inner(self.before(x).relu())).relu())


@pytest.mark.parametrize("name", OPERATORS)
def test_an_unknown_operator_pins_with_operator_module_and_line_and_the_trace_goes_on(name: str) -> None:
    model = filled(Around(name))
    channels = attrim.trace(model, image())
    assert {g.id: g.size for g in channels} == {"after": 6}
    pins = {str(p.axis): p for p in channels.pinned}
    pin = pins["before.weight:0"]
    assert (pin.size, pin.positions.tolist()) == (8, list(range(8)))
    assert pin.reason.text.startswith(f"no rule for operator {name}")
    assert pin.reason.operator == name
    assert pin.reason.module == "inner.0"
    path, line = pin.reason.source.rsplit(":", 1)
    assert path.endswith("trace/test_unknown.py")
    assert int(line) == inspect.getsourcelines(OPERATORS[name])[1]
    assert pins["before.bias:0"].reason == pin.reason
    assert pins["after.weight:1"].reason.text == "contracted with an axis that does not follow the cut"
    plan = kept_at_random(channels)
    assert attrim.verify(model, attrim.apply(model, plan), plan, image()).ok


def test_an_unknown_operator_on_weights_pins_the_weight() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.body, self.head = (
                nn.Parameter(torch.ones(8, 3, 1, 1)),
                nn.Conv2d(8, 6, 1),
                nn.Conv2d(6, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(torch.conv2d(x, twist(self.weight))).relu())

    channels = attrim.trace(filled(Computed()), image())
    assert list(channels.groups) == ["body"]
    assert "dim 0 (8): all pinned: no rule for operator attrim_tests.twist" in channels.explain("weight")
    assert "dim 1 (3): all pinned" in channels.explain("weight:1")


def test_values_that_leave_torch_and_come_back_are_pinned() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(torch.tensor(self.before(x).tolist(), dtype=x.dtype))

    model = filled(Leaves())
    channels = attrim.trace(model, image(2, 4))
    assert len(channels) == 0
    assert "dim 0 (8): all pinned" in channels.explain("before.weight:0")
