"""Attributes of modules tell the truth after a cut: torch's own by the table, a user's by a table of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import REPAIRS, PruningPlan
from attrim.core.plan import AttributeCut, Cut
from attrim.errors import PlanError, SurgeryError
from attrim.modules.names import fingerprint, named_tensors
from nets import filled, image


def hand_made(model: nn.Module, keep: Mapping[str, Mapping[int, tuple[int, ...]]], **fields: Any) -> PruningPlan:
    """A plan without a trace."""
    shapes = named_tensors(model).shapes
    cuts = {name: Cut(shapes[name], dims) for name, dims in keep.items()}
    return PruningPlan(fingerprint(shapes), cuts, **fields)


CASES: dict[str, tuple[nn.Module, dict[str, dict[int, tuple[int, ...]]], dict[str, Any]]] = {
    "convolution": (
        nn.Conv2d(6, 8, 3),
        {"weight": {0: (0, 2, 5), 1: (1, 2)}, "bias": {0: (0, 2, 5)}},
        {"in_channels": 2, "out_channels": 3, "groups": 1},
    ),
    "convolution in one dimension": (
        nn.Conv1d(6, 8, 3, bias=False), {"weight": {1: (1, 2, 3)}}, {"in_channels": 3, "out_channels": 8},
    ),
    "places of a grouped convolution": (
        nn.Conv2d(8, 12, 3, groups=4),
        {"weight": {0: (0, 2, 3, 5, 6, 8, 9, 11), 1: (1,)}, "bias": {0: (0, 2, 3, 5, 6, 8, 9, 11)}},
        {"in_channels": 4, "out_channels": 8, "groups": 4},
    ),
    "groups of a grouped convolution": (
        nn.Conv2d(8, 12, 3, groups=4),
        {"weight": {0: (3, 4, 5, 9, 10, 11)}, "bias": {0: (3, 4, 5, 9, 10, 11)}},
        {"in_channels": 4, "out_channels": 6, "groups": 2},
    ),
    "depthwise convolution": (
        nn.Conv2d(6, 6, 3, groups=6),
        {"weight": {0: (0, 4)}, "bias": {0: (0, 4)}},
        {"in_channels": 2, "out_channels": 2, "groups": 2},
    ),
    "depthwise convolution with a multiplier": (
        nn.Conv2d(4, 8, 3, groups=4),
        {"weight": {0: (0, 1, 6, 7)}, "bias": {0: (0, 1, 6, 7)}},
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "transposed convolution": (
        nn.ConvTranspose2d(6, 8, 3),
        {"weight": {0: (0, 5), 1: (1, 2, 3)}, "bias": {0: (1, 2, 3)}},
        {"in_channels": 2, "out_channels": 3, "groups": 1},
    ),
    "grouped transposed convolution": (
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        {"weight": {0: (0, 1, 3, 4), 1: (1,)}, "bias": {0: (1, 3)}},
        {"in_channels": 4, "out_channels": 2, "groups": 2},
    ),
    "depthwise transposed convolution": (
        nn.ConvTranspose2d(6, 6, 3, groups=6),
        {"weight": {0: (2, 3, 5)}, "bias": {0: (2, 3, 5)}},
        {"in_channels": 3, "out_channels": 3, "groups": 3},
    ),
    "batch norm": (
        nn.BatchNorm2d(8),
        {n: {0: (1, 3, 4)} for n in ("weight", "bias", "running_mean", "running_var")},
        {"num_features": 3},
    ),
    "batch norm without affine": (
        nn.BatchNorm1d(8, affine=False), {n: {0: (1, 3)} for n in ("running_mean", "running_var")}, {"num_features": 2},
    ),
    "instance norm": (
        nn.InstanceNorm2d(8, affine=True), {n: {0: (1, 3)} for n in ("weight", "bias")}, {"num_features": 2},
    ),
    "groups of a group norm": (
        nn.GroupNorm(4, 8), {n: {0: (0, 1, 6, 7)} for n in ("weight", "bias")}, {"num_groups": 2, "num_channels": 4},
    ),
    "places of a group norm": (
        nn.GroupNorm(2, 8), {n: {0: (0, 1, 4, 5)} for n in ("weight", "bias")}, {"num_groups": 2, "num_channels": 4},
    ),
    "layer norm": (nn.LayerNorm(8), {n: {0: (0, 7)} for n in ("weight", "bias")}, {"normalized_shape": (2,)}),
    "layer norm over two axes": (
        nn.LayerNorm((8, 5)), {n: {0: (0, 7)} for n in ("weight", "bias")}, {"normalized_shape": (2, 5)},
    ),
    "rms norm": (nn.RMSNorm(8), {"weight": {0: (0, 1, 7)}}, {"normalized_shape": (3,)}),
    "linear": (
        nn.Linear(6, 8), {"weight": {0: (0, 1), 1: (3, 4, 5)}, "bias": {0: (0, 1)}},
        {"in_features": 3, "out_features": 2},
    ),
    "embedding": (nn.Embedding(9, 8), {"weight": {1: (0, 4)}}, {"num_embeddings": 9, "embedding_dim": 2}),
    "embedding bag": (nn.EmbeddingBag(9, 8), {"weight": {1: (0, 4)}}, {"num_embeddings": 9, "embedding_dim": 2}),
    "prelu": (nn.PReLU(8), {"weight": {0: (2, 3, 4)}}, {"num_parameters": 3}),
    "bilinear": (
        nn.Bilinear(4, 5, 6), {"weight": {0: (0,), 1: (1, 2), 2: (0, 3, 4)}, "bias": {0: (0,)}},
        {"out_features": 1, "in1_features": 2, "in2_features": 3},
    ),
    "lstm": (
        nn.LSTM(5, 3),
        {
            "weight_ih_l0": {0: (0, 2, 3, 5, 6, 8, 9, 11), 1: (1, 2)},
            "weight_hh_l0": {0: (0, 2, 3, 5, 6, 8, 9, 11), 1: (0, 2)},
            "bias_ih_l0": {0: (0, 2, 3, 5, 6, 8, 9, 11)},
            "bias_hh_l0": {0: (0, 2, 3, 5, 6, 8, 9, 11)},
        },
        {"input_size": 2, "hidden_size": 2},
    ),
    "gru cell": (
        nn.GRUCell(5, 3),
        {
            "weight_ih": {0: (0, 2, 3, 5, 6, 8)},
            "weight_hh": {0: (0, 2, 3, 5, 6, 8), 1: (0, 2)},
            "bias_ih": {0: (0, 2, 3, 5, 6, 8)},
            "bias_hh": {0: (0, 2, 3, 5, 6, 8)},
        },
        {"input_size": 5, "hidden_size": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attributes_of_torch_modules(name: str) -> None:
    layer, keep, expected = CASES[name]
    model = nn.ModuleDict({"layer": layer})
    before = {k: getattr(layer, k) for k in expected}
    small = attrim.apply(model, hand_made(model, {f"layer.{n}": dims for n, dims in keep.items()}))
    assert {k: getattr(small["layer"], k) for k in expected} == expected
    assert {k: getattr(layer, k) for k in expected} == before != expected
    fresh = {n: tuple(t.shape) for n, t in (*small["layer"].named_parameters(), *small["layer"].named_buffers())}
    for tensor, dims in keep.items():
        assert all(fresh[tensor][d] == len(kept) for d, kept in dims.items())
    assert repr(small["layer"]) != repr(layer)


def test_every_repaired_layer_runs_with_its_new_width() -> None:
    inputs = {
        "convolution": (2, 2, 6, 6), "places of a grouped convolution": (2, 4, 6, 6),
        "groups of a grouped convolution": (2, 4, 6, 6), "depthwise convolution": (2, 2, 6, 6),
        "depthwise convolution with a multiplier": (2, 2, 6, 6), "transposed convolution": (2, 2, 6, 6),
        "grouped transposed convolution": (2, 4, 6, 6), "depthwise transposed convolution": (2, 3, 6, 6),
        "batch norm": (2, 3, 6, 6), "instance norm": (2, 2, 6, 6), "groups of a group norm": (2, 4, 6, 6),
        "layer norm over two axes": (2, 2, 5), "linear": (2, 3), "prelu": (2, 3, 4), "lstm": (4, 2), "gru cell": (2, 5),
    }  # fmt: skip
    widths = {"convolution": 3, "grouped transposed convolution": 2, "groups of a grouped convolution": 6, "linear": 2}
    for name, shape in inputs.items():
        layer, keep, _ = CASES[name]
        model = nn.ModuleDict({"layer": layer})
        small = attrim.apply(model, hand_made(model, {f"layer.{n}": dims for n, dims in keep.items()}))
        out = small["layer"](image(*shape))
        assert name not in widths or out.shape[1] == widths[name], name


def test_a_recurrent_layer_keeps_the_list_of_weights_that_its_kernel_reads() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(4, 7), nn.LSTM(7, 6, 2, bidirectional=True), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embed(x))[0])

    model, example = filled(Reader()), image(5, 2, 4)
    channels = attrim.trace(model, example)
    plan = attrim.plan_from_kept(channels, {g.id: range(g.size // 2) for g in channels})
    small = attrim.apply(model, plan)
    assert (small.rnn.input_size, small.rnn.hidden_size) == (3, 3)
    assert [w.data_ptr() for w in small.rnn._flat_weights] == [p.data_ptr() for p in small.rnn.parameters()]
    assert attrim.verify(model, small, plan, example).max_error < 1e-12


@pytest.mark.parametrize(
    ("layer", "kept", "text"),
    [
        (
            nn.Conv2d(8, 8, 3, groups=4, bias=False),
            (0, 1, 2, 4),
            r"a grouped convolution with 4 groups would keep \[2, 1, 1, 0\]",
        ),
        (nn.GroupNorm(2, 8), (0, 1, 2, 4), r"a grouped norm with 2 groups would keep \[3, 1\]"),
    ],
    ids=["convolution", "norm"],
)
def test_an_uneven_cut_of_groups_is_refused(layer: nn.Module, kept: tuple[int, ...], text: str) -> None:
    model = nn.ModuleDict({"layer": layer})
    plan = hand_made(model, {f"layer.{n}": {0: kept} for n, _ in layer.named_parameters()})
    with pytest.raises(SurgeryError, match=text) as caught:
        attrim.apply(model, plan)
    assert "every surviving group must keep the same number" in str(caught.value)
    assert "attrim.allocate" in str(caught.value)


class Wide(nn.Conv2d):
    """A convolution that also states its width under a name of its own."""

    def __init__(self, cin: int, planes: int) -> None:
        super().__init__(cin, planes, 1)
        self.planes = planes


class Gain(nn.Module):
    """A module that torch does not know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gain = width, nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def own_net() -> nn.Module:
    return filled(nn.Sequential(Wide(3, 8), Gain(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))


def test_a_table_of_the_user_repairs_modules_of_the_user() -> None:
    calls: list[Any] = []

    def wide(module: Any, keep: Any) -> None:
        calls.append(keep)
        REPAIRS[nn.modules.conv._ConvNd](module, keep)
        module.planes = module.out_channels

    def gain(module: Any, keep: Any) -> None:
        module.width = len(keep["gain"][0])

    model = own_net()
    plan = attrim.plan_from_kept(attrim.trace(model, image()), {"0": [1, 6, 7]})
    small = attrim.apply(model, plan, repairs={Wide: wide, Gain: gain})
    assert (small[0].planes, small[0].out_channels, small[1].width, small[3].in_channels) == (3, 3, 3, 3)
    assert calls == [{"weight": {0: (1, 6, 7)}, "bias": {0: (1, 6, 7)}}]
    assert (model[0].planes, model[1].width) == (8, 8)
    bare = attrim.apply(model, plan)
    assert (bare[0].out_channels, bare[0].planes, bare[1].width) == (3, 8, 8)
    assert Wide not in REPAIRS


def test_prune_hands_the_table_on() -> None:
    def gain(module: Any, keep: Any) -> None:
        module.width = len(keep["gain"][0])

    result = attrim.prune(own_net(), image(), budget=attrim.Budget(channels=0.5), repairs={Gain: gain})
    assert result.model[1].width == 4


def test_attributes_of_the_plan_are_written_also_inside_tuples() -> None:
    class Stated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.sizes, self.names = 4, (2, 8), [5, 6]
            self.linear = nn.Linear(8, 8)

    model = nn.Sequential(Stated())
    attributes = {
        "0": {"heads": AttributeCut(4, 3), "sizes[1]": AttributeCut(8, 6), "names[0]": AttributeCut(5, 1)},
        "0.linear": {"out_features": AttributeCut(8, 6)},
    }
    plan = hand_made(
        model, {"0.linear.weight": {0: tuple(range(6))}, "0.linear.bias": {0: tuple(range(6))}}, attributes=attributes
    )
    small = attrim.apply(model, plan)
    assert (small[0].heads, small[0].sizes, small[0].names) == (3, (2, 6), [1, 6])
    assert (model[0].heads, model[0].sizes, model[0].names) == (4, (2, 8), [5, 6])
    assert small[0].linear.out_features == 6


def test_attributes_that_do_not_fit_the_model_are_refused() -> None:
    model = nn.Sequential(Gain(8))
    with pytest.raises(PlanError, match=r"the plan sets '0\.width' from 9 to 4, but it is 8 here"):
        attrim.apply(model, hand_made(model, {}, attributes={"0": {"width": AttributeCut(9, 4)}}))
    with pytest.raises(
        PlanError, match=r"the plan changes attributes of module 'body\.3', which this model does not have"
    ):
        attrim.apply(model, hand_made(model, {}, attributes={"body.3": {"width": AttributeCut(8, 4)}}))
    for absent in ("height", "gain[12]", "width[0]"):
        with pytest.raises(PlanError, match=re.escape(absent)):
            attrim.apply(model, hand_made(model, {}, attributes={"0": {absent: AttributeCut(8, 4)}}))
