"""Layers that read a part of a stream: surgery equals zeroing, costs are counted ones, and nothing is lost on the way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.core.plan import Cut
from attrim.core.selection import Selection
from attrim.errors import InputError, PlanError
from attrim.modules.input_groups import input_groups, streams_of
from attrim.modules.select import SelectConv2d, SelectLinear
from nets import Attention, Mobile, Plain, Residual, filled, image


class PreActivation(nn.Module):
    """Norm and activation between the stream and the layers that read it; a flattened head with two places a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Conv1d(6, 5, 3, padding=1)
        self.outer = nn.Conv1d(5, 6, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(self.norm(x).relu()).relu())
        return self.head(nn.functional.adaptive_avg_pool1d(x, 2).flatten(1))


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as made

    return made(num_classes=7)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: Residual((8, 16), 2), (2, 3, 8, 8)),
    "pre-activation": (PreActivation, (2, 3, 9)),
    "mobile": (Mobile, (2, 3, 16, 16)),
    "tokens": (Attention, (2, 7, 12)),
    "resnet18": (resnet18, (1, 3, 32, 32)),
}


def made(name: str) -> tuple[nn.Module, Tensor, attrim.ChannelMap, attrim.ChannelMap]:
    network, shape = CASES[name]
    model, x = filled(network()).double(), image(*shape, dtype=torch.float64)
    channels = attrim.trace(model, x)
    return model, x, channels, input_groups(model, channels)


def kept_of(channels: attrim.ChannelMap, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {g.id: np.sort(rng.permutation(g.size)[: rng.integers(1, g.size)]) for g in channels}


def zeroing(selection: Selection) -> Callable[[nn.Module, Any], Any]:
    def hook(module: nn.Module, args: Any) -> Any:
        mask = torch.zeros(args[0].shape[selection.dim], dtype=torch.float64)
        mask[list(selection.keep)] = 1
        return (args[0] * mask.view(-1, *[1] * (-1 - selection.dim)),)

    return hook


@pytest.mark.parametrize("name", CASES)
def test_surgery_equals_zeroing_and_costs_what_was_said(name: str) -> None:
    model, x, channels, free = made(name)
    assert (free.cost.macs(), free.cost.params()) == (channels.cost.macs(), channels.cost.params())
    kept = kept_of(free)
    plan = attrim.plan_from_kept(free, kept)
    small = attrim.apply(model, plan)
    assert plan.selects

    inner = attrim.plan_from_kept(channels, {id: k for id, k in kept.items() if id not in free.inputs})
    masked = attrim.apply(model, inner)
    for path, selection in plan.selects.items():
        masked.get_submodule(path).register_forward_pre_hook(zeroing(selection))
    difference = (masked(x) - small(x)).abs().max() / masked(x).abs().max()
    assert difference < 1e-9

    counted = attrim.trace(small, x)
    assert plan.provenance["macs_after"] == counted.cost.macs()
    assert plan.provenance["params_after"] == counted.cost.params() == sum(p.numel() for p in small.parameters())
    assert plan.provenance["fingerprint_after"] == counted.fingerprint
    check = attrim.verify(model, small, plan, x)
    if check.exact:
        assert check.ok
        assert check.max_error < 1e-9
    else:
        assert check.ok
        assert name == "tokens"


def test_what_can_be_selected() -> None:
    _, _, channels, free = made("residual")
    assert streams_of(made("residual")[0], channels) == ("conv1", "layers.2.conv2")
    assert [id for id in free.groups if id in free.inputs] == [
        "layers.0.conv1.in", "layers.1.conv1.in", "layers.2.conv1.in", "layers.2.down.0.in", "layers.3.conv1.in", "fc.in",
    ]  # fmt: skip
    assert "conv1" not in free.groups
    assert "conv1" in channels.groups
    assert "stays whole" in free.explain("conv1.weight:0")
    assert "group 'layers.1.conv1.in', 8 channels as in, exact" in free.explain("layers.1.conv1.weight:1")
    assert free["layers.1.conv1.in"].exact
    assert not any("stays whole" in str(pin.reason) for pin in channels.pinned)


def test_a_network_without_streams_keeps_its_map() -> None:
    model = filled(Plain())
    channels = attrim.trace(model, image())
    assert input_groups(model, channels) is channels
    with pytest.raises(InputError, match="'nowhere' is no group"):
        input_groups(model, channels, ["nowhere"])


def test_allocate_gives_every_reader_its_own_width() -> None:
    model, x, _, free = made("residual")
    scores = attrim.Scores(
        {g.id: torch.rand(g.size, generator=torch.Generator().manual_seed(4)) for g in free}, "random"
    )
    plan = attrim.allocate(free, scores, attrim.Budget(macs=0.4))
    counted = attrim.trace(attrim.apply(model, plan), x).cost.macs()
    assert 0.38 < counted / free.cost.macs() <= 0.4
    assert len({len(s.keep) for s in plan.selects.values()}) > 2


def test_names_hooks_state_and_copies() -> None:
    model, x, _, free = made("residual")
    model.layers[1].conv1.note = "mine"
    plan = attrim.plan_from_kept(free, kept_of(free))
    small = attrim.apply(model, plan).train()
    layer = small.layers[1].conv1
    assert type(layer) is SelectConv2d
    assert isinstance(small.fc, SelectLinear)
    assert layer.note == "mine"
    assert (layer.in_channels, small.fc.in_features) == (layer.weight.shape[1], small.fc.weight.shape[1])
    assert list(small.state_dict()) == list(model.state_dict())
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert type(model.layers[1].conv1) is nn.Conv2d
    small.eval()
    again = (copy.deepcopy(small), pickle.loads(pickle.dumps(small)))
    assert all(torch.equal(other(x), small(x)) for other in again)
    small.float()
    assert layer.positions.dtype is torch.int64
    assert "positions=(" in repr(layer)


def test_save_and_load(tmp_path: Path) -> None:
    model, x, _, free = made("residual")
    plan = attrim.plan_from_kept(free, kept_of(free))
    small = attrim.apply(model, plan)
    attrim.save(small, plan, tmp_path)
    fresh = Residual((8, 16), 2).double().eval()
    assert torch.equal(attrim.load(tmp_path, model=fresh)(x), small(x))
    assert attrim.PruningPlan.load(tmp_path / "plan.json") == plan


def test_torch_export() -> None:
    model, x, _, free = made("residual")
    small = attrim.apply(model, attrim.plan_from_kept(free, kept_of(free)))
    exported = torch.export.export(small, (x,))
    assert torch.allclose(exported.module()(x), small(x), rtol=1e-12)


def test_optimizer_state_follows() -> None:
    model, x, _, free = made("residual")
    plan = attrim.plan_from_kept(free, kept_of(free))
    small = attrim.apply(model, plan)
    old = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()
    old.step()
    new = attrim.carry_optimizer(old, plan, model, small)
    momentum = old.state[model.layers[1].conv1.weight]["momentum_buffer"]
    cut = plan.cuts["layers.1.conv1.weight"].keep
    expected = momentum[list(cut[0])][:, list(plan.selects["layers.1.conv1"].keep)]
    assert torch.equal(new.state[small.layers[1].conv1.weight]["momentum_buffer"], expected)


def test_twice_is_once() -> None:
    model, x, _, free = made("residual")
    first = attrim.plan_from_kept(free, {id: k for id, k in kept_of(free).items() if id != "layers.1.conv1.in"})
    once = attrim.apply(model, first)
    second_map = input_groups(once, attrim.trace(once, x))
    assert set(free.inputs) == set(second_map.inputs)  # what was whole so far reads a stream that others select from
    assert second_map.cost.macs() == first.provenance["macs_after"]
    second = attrim.plan_from_kept(second_map, {id: range(1, max(2, second_map[id].size)) for id in
                                                second_map.inputs if second_map[id].size > 1})  # fmt: skip
    twice = attrim.apply(once, second)
    assert attrim.verify(once, twice, second, x).ok
    joined = first.then(second)
    at_once = attrim.apply(model, joined)
    assert torch.equal(at_once(x), twice(x))
    check = attrim.verify(model, at_once, joined, x)
    assert check.ok
    assert check.max_error < 1e-9
    assert joined.provenance["macs_after"] == attrim.trace(at_once, x).cost.macs()


def test_a_selection_after_a_cut_of_the_stream() -> None:
    model, x, channels, _ = made("residual")
    first = attrim.plan_from_kept(channels, {"conv1": [0, 2, 3, 5, 7], "layers.0.conv1": [1, 2]})
    once = attrim.apply(model, first)
    free = input_groups(once, attrim.trace(once, x))
    joined = first.then(attrim.plan_from_kept(free, {"layers.1.conv1.in": [0, 3], "fc.in": range(9)}))
    assert joined.selects["layers.1.conv1"].keep == (0, 3)
    assert joined.cuts["layers.1.conv1.weight"].keep[1] == (0, 5)
    small = attrim.apply(model, joined)
    assert attrim.verify(model, small, joined, x).ok
    wrong = copy.deepcopy(small)
    wrong.layers[1].conv1.positions[1] = 4
    check = attrim.verify(model, wrong, joined, x)
    assert not check.ok
    assert "reads other positions" in str(check)


def test_with_dropped_branches() -> None:
    model, x, _, free = made("residual")
    kept = kept_of(free)
    plan = attrim.plan_from_kept(free, kept, drops=["layers.1", "layers.2"])
    assert set(plan.selects) == {"layers.0.conv1", "layers.2.down.0", "layers.3.conv1", "fc"}
    small = attrim.apply(model, plan)
    check = attrim.verify(model, small, plan, x)
    assert check.ok
    assert check.max_error < 1e-9
    assert plan.provenance["macs_after"] == attrim.trace(small, x).cost.macs()
    later = attrim.plan_from_kept(free, kept)
    once = attrim.apply(model, later)
    dropped = attrim.plan_from_kept(attrim.trace(once, x), {}, drops=["layers.1"])
    joined = later.then(dropped)
    assert "layers.1.conv1" not in joined.selects
    assert attrim.verify(model, attrim.apply(model, joined), joined, x).ok


def test_a_changed_weight_does_not_verify() -> None:
    model, x, _, free = made("residual")
    plan = attrim.plan_from_kept(free, {"layers.1.conv1.in": [0, 3]})
    small = attrim.apply(model, plan)
    with torch.no_grad():
        small.layers[1].conv1.weight[0, 0] += 1e-3
    assert not attrim.verify(model, small, plan, x).ok
    plain = attrim.apply(model, replace(plan, selects={}))
    with pytest.raises(PlanError, match=r"'layers.1.conv1.positions' should have shape \(2,\), found None"):
        attrim.verify(model, plain, plan, x)


@pytest.mark.parametrize(
    ("selects", "match"),
    [
        ({"layers.9.conv1": Selection(-3, (0,))}, "which this model does not have"),
        ({"layers.1.bn1": Selection(-3, (0,))}, r"\(BatchNorm2d\); expected a Conv1d"),
        ({"layers.1.conv1": Selection(-1, (0, 3))}, "dimension -1 of the input .* lie on dimension -3"),
        ({"layers.1.conv1": Selection(-3, (0, 3, 4))}, "reads 3 positions of its input, but dimension 1 .* keeps 2"),
        ({"layers.1.conv1": Selection(-3, (0, 4))}, "or other ones"),
        ({"layers.0.conv1": Selection(-3, (0, 4))}, "its weight is not cut there"),
    ],
)
def test_selections_that_do_not_fit(selects: dict[str, Selection], match: str) -> None:
    model, _, _, free = made("residual")
    plan = attrim.plan_from_kept(free, {"layers.1.conv1.in": [0, 3]})
    with pytest.raises(PlanError, match=match):
        attrim.apply(model, replace(plan, selects=selects))


def test_grouped_convolutions_read_the_whole_stream() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.outer = nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))

    model = filled(Grouped())
    free = input_groups(model, attrim.trace(model, image()), ["stem"])
    assert set(free.inputs) == {"head.in"}
    plan = attrim.plan_from_kept(free, {"head.in": [1, 2]})
    with pytest.raises(PlanError, match="Conv2d with 2 groups"):
        attrim.apply(model, replace(plan, selects={"inner": Selection(-3, (0,))}))


def test_layers_whose_weights_a_fused_kernel_takes_read_everything() -> None:
    model = filled(
        nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3))
    )
    channels = attrim.trace(model, image(2, 4, 5))
    assert not {"1.linear1", "1.self_attn.out_proj"} & set(input_groups(model, channels).inputs.values())
    cut = Cut((12, 8), {1: (0, 1)})
    plan = attrim.PruningPlan(
        channels.fingerprint, {"1.linear1.weight": cut}, selects={"1.linear1": Selection(-1, (0, 1))}
    )
    with pytest.raises(PlanError, match=r"'1.linear1' \(Linear\); expected .* not inside a fused module"):
        attrim.apply(model, plan)
