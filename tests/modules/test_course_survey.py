"""Where the outputs of contractions are compared: behind affine maps and sums, before other uses; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attrim.modules.course.follow import Arrival, Follow
from attrim.modules.course.survey import Course, Survey, Unit
from nets import Mobile, Residual, filled, image


class Net(nn.Module):
    """``way`` computes, from this module's layers."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


@torch.no_grad()
def course(net: nn.Module, x: Tensor | None = None, cut: dict[str, set[int]] | None = None) -> Course:
    with Survey(net) as survey:
        net(image(2, 4, 6, 6) if x is None else x)
    return survey.course(cut or {})


def units(way: Callable[[Any, Tensor], Tensor], **cut: set[int]) -> dict[str, Unit]:
    found = course(filled(Net(way)), cut={f"{name}.weight": dims for name, dims in cut.items()})
    return {unit.key[0].removesuffix(".weight"): unit for unit in found.units}


def test_affine_maps_are_part_of_the_way():
    unit = units(lambda m, x: m.bn(m.a(x)))["a"]
    assert (unit.steps, unit.join, unit.rectified, unit.bias, unit.norm) == (1, False, False, True, 0)
    unit = units(lambda m, x: (m.bn2(m.bn(m.c(x))) * m.scale + 1).relu())["c"]
    assert (unit.steps, unit.join, unit.rectified, unit.bias, unit.norm) == (4, False, True, False, 0)
    unit = units(lambda m, x: m.bn(m.c(x) * m.scale))["c"]
    assert (unit.steps, unit.norm) == (2, -1)  # a constant before the factor cannot go into the norm behind


def test_the_way_ends_where_something_else_reads():
    def way(m, x):
        y = m.a(x)
        return m.bn(y) + y.mean((2, 3), keepdim=True)

    assert units(way)["a"].steps == 0
    assert units(lambda m, x: m.bn(m.a(x).sigmoid()))["a"].steps == 0


@pytest.mark.parametrize("rectifier", [F.relu, F.relu_, F.relu6, F.hardtanh, F.gelu, F.leaky_relu])
def test_only_functions_that_cut_at_zero_rectify(rectifier):
    unit = units(lambda m, x: rectifier(m.bn(m.a(x))))["a"]
    assert unit.rectified == (rectifier in (F.relu, F.relu_, F.relu6))


def test_a_relu_that_is_not_the_only_reader_does_not_rectify():
    def way(m, x):
        y = m.bn(m.a(x))
        return y.relu() + y.mean((2, 3), keepdim=True)

    assert not units(way)["a"].rectified

    def in_place(m, x):
        y = m.bn(m.a(x)).relu_()
        return y + y.mean((2, 3), keepdim=True)

    assert units(in_place)["a"].rectified


def test_a_sum_with_another_branch_is_the_place_of_comparison():
    unit = units(lambda m, x: (m.bn(m.a(x)) + x).relu())["a"]
    assert (unit.steps, unit.join, unit.rectified) == (1, True, True)
    unit = units(lambda m, x: x + m.a(x))["a"]
    assert (unit.steps, unit.join, unit.rectified) == (0, True, False)

    def in_place(m, x):
        y = m.bn(m.a(x))
        y += x
        return F.relu(y, inplace=True)

    unit = units(in_place)["a"]
    assert (unit.join, unit.rectified) == (True, True)


@pytest.mark.parametrize("late", [False, True])
def test_a_sum_belongs_to_the_contraction_whose_inputs_were_cut(late):
    def way(m, x):
        shortcut = None if late else m.bn2(m.b(x))
        y = m.bn(m.a(x))
        y += m.bn2(m.b(x)) if shortcut is None else shortcut
        return y.relu()

    for cut in ("a", "b"):
        found = units(way, **{cut: {1}})
        assert {name: unit.join for name, unit in found.items()} == {"a": cut == "a", "b": cut == "b"}
        assert list(found)[-1] == cut  # it is compared last, whichever ran first
        assert found[cut].rectified
        assert not found["b" if cut == "a" else "a"].rectified


def test_sums_that_are_no_join():
    def scaled(m, x):
        return torch.add(m.a(x), x, alpha=2)

    def broadcast(m, x):
        return m.a(x) + x[:, :, :1, :1]

    def twice(m, x):
        y = m.a(x)
        return y + y

    def product(m, x):
        return m.a(x) * x

    for way in (scaled, broadcast, twice, product):
        unit = units(way)["a"]
        assert (unit.steps, unit.join) == (0, False), way


def test_tokens_are_followed_through_their_layouts():
    def way(m, x):
        y = m.linear(x.flatten(2).transpose(1, 2))  # not contiguous: the bias is added afterwards
        return F.relu(m.bn(y.transpose(1, 2).unflatten(2, (6, 6))))

    unit = units(way)["linear"]
    assert unit.rectified
    assert (unit.bias, unit.norm) == (True, unit.steps - 1)
    assert unit.places == 2 * 36


def test_what_cannot_be_fitted_is_refused_with_the_reason():
    def way(m, x):
        x = m.a(m.a(x)) + m.b(x)
        return F.conv_transpose2d(x, m.c.weight) + m.b.weight.sum()

    found = course(filled(Net(way)), cut={"b.weight": {1}})
    assert found.refused["a.weight"].startswith("runs 2 times in a forward pass")
    assert found.refused["b.weight"] == "its weight is used elsewhere too"
    assert found.refused["c.weight"] == "a transposed convolution"
    assert [unit.key[0] for unit in found.units] == []
    assert found.contracted["c.weight"] == {0}
    assert set(found.left_out({"a.weight": {1}, "c.weight": {0}, "b.weight": {0}})) == {"a.weight", "c.weight"}


def test_a_bias_that_others_use_takes_no_constant():
    unit = units(lambda m, x: m.a(x) + m.a.bias.view(-1, 1, 1))["a"]
    assert not unit.bias
    unit = units(lambda m, x: m.bn(m.c(x)) + m.bn(x))["c"]
    assert unit.norm == -1  # its running mean is another's as well


def test_parts_of_a_weight_are_units_of_their_own():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(9, 4)), nn.Parameter(torch.zeros(9))

        def forward(self, x: Tensor) -> Tensor:
            pairs = zip(self.weight.chunk(3), self.bias.chunk(3), strict=True)
            return torch.cat([F.linear(x, w, b).relu() for w, b in pairs])

    found = course(filled(Packed()), image(5, 4))
    assert [(unit.key, unit.offset, unit.bias, unit.outputs) for unit in found.units] == [
        (("weight", i), 12 * i, True, 3) for i in range(3)
    ]


def test_a_residual_network_has_its_blocks_joined_and_rectified():
    found = course(filled(Residual(widths=(4, 6), blocks=2)), image(2, 3, 8, 8), {"layers.0.conv2.weight": {1}})
    by_name = {unit.key[0]: unit for unit in found.units}
    last = [f"layers.{i}.conv2.weight" for i in range(4)]
    assert {name for name, unit in by_name.items() if unit.join} == set(last)
    assert all(by_name[name].rectified for name in last)
    assert not by_name["layers.2.down.0.weight"].rectified
    assert by_name["fc.weight"] == found.units[-1]
    assert found.refused == {}


def test_an_inverted_residual_network_has_linear_ends():
    found = course(filled(Mobile()), image(2, 3, 16, 16))
    by_name = {unit.key[0]: unit for unit in found.units}
    projections = {name: unit for name, unit in by_name.items() if "project" in name}
    assert not any(unit.rectified for unit in projections.values())
    assert [unit.join for unit in projections.values()] == [True, False, True, False, True]
    assert all(unit.rectified for name, unit in by_name.items() if "expand" in name or "depth" in name)


# following


def arrivals(net: nn.Module, x: Tensor, act: Callable[[Arrival], None]) -> Tensor:
    found = course(net, x)
    with torch.no_grad(), Follow(net, found.units, act):
        return net(x)


@pytest.mark.parametrize("kind", [Residual, Mobile])
def test_arrivals_come_in_order_with_the_values_of_the_network(kind):
    net = filled(kind().double())
    x = image(2, 3, 16, 16, dtype=torch.float64)
    order = []

    def look(arrival: Arrival) -> None:
        order.append(arrival.unit)
        at = torch.arange(arrival.places)[::7]
        scale, shift = arrival.affine()
        before = torch.einsum("rbct,boct->rbo", arrival.inputs(at), arrival.use.weight).flatten(1)
        before = before if arrival.bias is None else before + arrival.bias
        torch.testing.assert_close(before * scale + shift, arrival.branch(at), rtol=0, atol=1e-9)

    y = arrivals(net, x, look)
    assert order == list(course(net, x).units)
    with torch.no_grad():
        assert torch.equal(y, net(x))


def test_an_output_that_is_computed_again_goes_on_changed():
    """Every weight is doubled on the way; the result is that of a network with doubled weights."""
    net = filled(Residual(widths=(4, 6), blocks=1).double())
    twin = filled(Residual(widths=(4, 6), blocks=1).double())
    x = image(2, 3, 8, 8, dtype=torch.float64)

    def double(arrival: Arrival) -> None:
        arrival.use.weight.mul_(2)
        arrival.renew()

    y = arrivals(net, x, double)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            if tensor.ndim > 1:
                tensor.mul_(2)
                assert torch.equal(dict(net.named_parameters())[name], tensor), name
        torch.testing.assert_close(y, twin(x), rtol=0, atol=1e-12)


def test_inputs_changed_before_the_sum_are_not_read_afterwards():
    """The contraction's input is overwritten while its output waits for the sum."""

    def way(m, x):
        y = x * 1
        z = m.a(y)
        y.mul_(0.5)
        return z + y

    net = filled(Net(way).double())
    x = image(2, 4, 6, 6, dtype=torch.float64)

    def look(arrival: Arrival) -> None:
        at = torch.arange(arrival.places)
        found = torch.einsum("rbct,boct->rbo", arrival.inputs(at), arrival.use.weight).flatten(1) + net.a.bias
        torch.testing.assert_close(found, arrival.branch(at), rtol=0, atol=1e-9)

    arrivals(net, x, look)


def test_a_product_with_factors_of_its_own_is_not_taken_for_a_plain_one():
    def way(m, x):
        flat = x.permute(0, 2, 3, 1).reshape(-1, 4)
        return torch.addmm(m.linear.bias, flat, m.linear.weight.t(), beta=0.5, alpha=2)

    net = filled(Net(way))
    found = course(net)
    assert [unit.key[0] for unit in found.units] == []
    assert "linear.weight" in found.refused
