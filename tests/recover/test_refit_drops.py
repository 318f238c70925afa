"""Reconstruction and folding where residual branches are gone: the layers around take over what they added."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from chains import batches, calibrated, pictures, quiet, same
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from attrim.errors import AttrimWarning, PlanError
from attrim.modules.names import named_tensors
from attrim.recover import fold_bias, free_recovery, reconstruct
from attrim.recover.free import output_gap
from attrim.recover.reconstruct import Refit
from nets import Mobile, Residual, filled

EXACT: dict[str, Any] = {"ridges": (1e-12,), "rectify": False}


class Add(nn.Module):
    """x + f(x), and nothing behind the sum but what is asked for."""

    def __init__(self, *layers: nn.Module, act: bool = False) -> None:
        super().__init__()
        self.f, self.act = nn.Sequential(*layers), act

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x
        return F.relu(out) if self.act else out


class Linear(nn.Module):
    """A stem, two blocks whose last layers are linear, and a head; on request the value between the blocks is returned."""

    def __init__(self, shown: bool = False) -> None:
        super().__init__()
        self.stem, self.shown = nn.Conv2d(3, 6, 1), shown
        self.one = Add(nn.Conv2d(6, 7, 1), nn.ReLU(), nn.Conv2d(7, 6, 1))
        self.two = Add(nn.Conv2d(6, 6, 1))
        self.head = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.one(self.stem(x))
        out = self.head(self.two(x))
        return (out, x) if self.shown else out


class Pre(nn.Module):
    """Pre-activation with a shared ReLU in place."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.conv2 = (nn.Conv2d(wide, wide, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x)))))) + x


class Squeezed(nn.Module):
    """Two convolutions and a scale for each channel; ReLU behind the sum."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.excite = nn.Conv2d(wide, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y * torch.sigmoid(self.excite(y.mean((2, 3), keepdim=True))))


class Tower(nn.Module):
    def __init__(self, block: type[nn.Module], wide: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU())
        self.blocks = nn.Sequential(*(block(wide) for _ in range(3)))
        self.head = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def shorter(
    model: nn.Module, x: Tensor, drops: Sequence[str], share: float = 1.0
) -> tuple[nn.Module, attrim.PruningPlan]:
    """Without these branches, and with the first channels of every group that is left."""
    channels = attrim.trace(model, x)
    kept = {g.id: range(int(g.size * share)) for g in channels} if share < 1 else {}
    plan = attrim.plan_from_kept(channels, kept, drops=drops)
    return attrim.apply(model, plan), plan


@torch.no_grad()
def silent(net: Any, *norms: str) -> Any:
    """The network with batch norms that give zero."""
    for path in norms:
        norm = net.get_submodule(path)
        norm.weight.zero_(), norm.bias.zero_()
    return net


def test_a_block_that_does_nothing_leaves_the_network_as_it_is() -> None:
    model = silent(filled(Residual((8, 12, 16))).double().eval(), "layers.1.bn2", "layers.2.bn2")
    data = batches(8, 3, 12, 12)
    small, plan = shorter(model, data[0], ["layers.1", "layers.2"])
    fitted = quiet(reconstruct, model, small, plan, data)
    assert same(fitted, small)
    with torch.no_grad():
        assert (fitted(data[0]) - model(data[0])).abs().max() <= 1e-12
    assert same(quiet(fold_bias, model, small, plan, data), small)


@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"sequence": False}, {"layers": "consumers"}], ids=str)
def test_the_block_before_takes_over_what_is_linear_in_what_it_makes(options: dict[str, Any]) -> None:
    model = filled(Linear()).double().eval()
    data = batches(8, 3, 6, 6)
    small, plan = shorter(model, data[0], ["two"])
    fits: list[Refit] = []
    fitted: Any = quiet(reconstruct, model, small, plan, data, on_layer=fits.append, **EXACT, **options)
    assert output_gap(model, small, data) > 1e-3
    (last,) = (fit for fit in fits if fit.tensor == "one.f.2.weight")
    assert last.before > 1e-3
    if options.get("sequence", True):
        assert last.after < 0.1 * last.before
        assert output_gap(model, fitted, data) < 0.05 * output_gap(model, small, data)
    assert output_gap(model, fitted, data) < output_gap(model, small, data)


def test_a_stem_takes_over_a_linear_block_exactly() -> None:
    data = batches(8, 3, 6, 6)
    linear: Any = filled(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), Add(nn.Conv2d(6, 6, 1)), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)
        )
    ).double()
    small, plan = shorter(linear.eval(), data[0], ["1"])
    fitted: Any = quiet(reconstruct, linear, small, plan, data, **EXACT)
    stem, block = (linear.get_submodule(path).weight[:, :, 0, 0] for path in ("0", "1.f.0"))
    torch.testing.assert_close(fitted[0].weight[:, :, 0, 0], stem + block @ stem, rtol=1e-6, atol=1e-8)
    assert output_gap(linear, fitted, data) < 1e-16


def test_a_value_that_others_still_read_keeps_its_meaning_and_the_layer_behind_takes_over() -> None:
    model: Any = filled(Linear(shown=True)).double().eval()
    data = batches(8, 3, 6, 6)
    small, plan = shorter(model, data[0], ["two"])
    fitted: Any = quiet(reconstruct, model, small, plan, data, **EXACT)
    with torch.no_grad():
        (out, between), (expected, kept) = fitted(data[0]), model(data[0])
    assert (between - kept).abs().max() <= 1e-12
    assert (out - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_block_before_the_classifier_is_left_to_the_classifier() -> None:
    model = calibrated(Tower(Pre))
    data = [pictures(32, i) for i in range(3)]
    small, plan = shorter(model, data[0][:2], ["blocks.2"])
    for options in ({}, {"layers": "consumers"}):
        fits: list[Refit] = []
        quiet(reconstruct, model, small, plan, data, on_layer=fits.append, **options)
        assert [fit.tensor for fit in fits if fit.ridge] == ["head.weight"]


@pytest.mark.parametrize("drops", [["layers.1"], ["layers.2"], ["layers.1", "layers.4", "layers.5"]], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_residual_networks_come_closer_to_the_original(drops: list[str], share: float) -> None:
    model = calibrated(Residual((8, 12, 16)))
    data, unseen = [pictures(32, i) for i in range(4)], [pictures(64, 99)]
    small, plan = shorter(model, data[0][:2], drops, share)
    fitted = quiet(reconstruct, model, small, plan, data)
    assert output_gap(model, fitted, unseen) < 0.5 * output_gap(model, small, unseen)
    assert list(fitted.state_dict()) == list(small.state_dict())
    assert not any(name.startswith("layers.1.") for name in fitted.state_dict() if "layers.1" in drops)
    assert attrim.apply(model, plan).state_dict().keys() == fitted.state_dict().keys()


@pytest.mark.parametrize("block", [Pre, Squeezed], ids=lambda b: b.__name__)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_other_blocks(block: type[nn.Module], which: int) -> None:
    model = calibrated(Tower(block))
    data, unseen = [pictures(32, i) for i in range(4)], [pictures(64, 99)]
    small, plan = shorter(model, data[0][:2], [f"blocks.{which}"])
    fitted = quiet(reconstruct, model, small, plan, data)
    assert output_gap(model, fitted, unseen) < 0.5 * output_gap(model, small, unseen)


def test_inverted_residuals() -> None:
    model = calibrated(Mobile())
    data, unseen = [pictures(32, i, 16) for i in range(4)], [pictures(64, 99, 16)]
    small, plan = shorter(model, data[0][:2], ["body.2", "body.4"])
    fitted = quiet(reconstruct, model, small, plan, data)
    assert output_gap(model, fitted, unseen) < 0.5 * output_gap(model, small, unseen)


def test_free_recovery_and_its_steps() -> None:
    model = calibrated(Residual((8, 12, 16)))
    data = [pictures(32, i) for i in range(2)]
    small, plan = shorter(model, data[0][:2], ["layers.3"], 0.75)
    steps: dict[str, float] = {}
    found = free_recovery(
        model, small, plan, data, on_step=lambda name, net, figures: steps.update({name: figures["gap"]})
    )
    assert list(steps) == ["reconstruct", "recalibrate"]
    assert output_gap(model, found, data) == pytest.approx(min(steps.values()))
    assert min(steps.values()) < 0.5 * output_gap(model, small, data)


def test_folding_takes_cut_channels_and_leaves_dropped_branches() -> None:
    model: Any = filled(Residual((8, 12, 16))).double().eval()
    with torch.no_grad():  # a constant channel: its batch norm gives 0.5 always
        model.layers[0].bn1.weight[7], model.layers[0].bn1.bias[7] = 0.0, 0.5
    model.layers[0].conv2 = nn.Conv2d(8, 8, 1, bias=False).double()
    silent(model, "layers.3.bn2")
    data = batches(4, 3, 12, 12)
    channels = attrim.trace(model, data[0])
    plan = attrim.plan_from_kept(channels, {"layers.0.conv1": range(7)}, drops=["layers.3"])
    small = attrim.apply(model, plan)
    for more in ({"batches": data}, {"example_inputs": data[0]}):
        folded = quiet(fold_bias, model, small, plan, **more)
        assert output_gap(model, folded, data) < 1e-20 < output_gap(model, small, data)


def test_networks_that_do_not_belong_together_are_named() -> None:
    model = filled(Residual((8, 12, 16))).eval()
    data = [pictures(4)]
    small, plan = shorter(model, data[0], ["layers.1"])
    others = {
        "'layers.1.conv1.weight' belongs to a residual branch that this plan drops, and is still there": model,
        "'layers.3.conv1.weight' should have shape": shorter(model, data[0], ["layers.1", "layers.3"])[0],
        "'conv1.weight' should have shape": shorter(model, data[0], ["layers.1"], 0.75)[0],
    }
    for call in (reconstruct, fold_bias):
        for message, other in others.items():
            with pytest.raises(PlanError, match=message):
                call(model, other, plan, data)
        with pytest.raises(PlanError, match="fingerprints differ"):
            call(small, small, plan, data)


def test_a_way_that_ends_elsewhere_without_the_branch_is_followed_as_far_as_both_go() -> None:
    """Without its only block, the stem's output has one reader more: the norm behind it."""

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), Pre(8)
            self.norm, self.conv, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(F.relu(self.norm(self.block(self.stem(x))))).relu().mean((2, 3)))

    model = calibrated(Short())
    data = [pictures(32, i) for i in range(3)]
    small, plan = shorter(model, data[0][:2], ["block"])
    fits: list[Refit] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttrimWarning)
        fitted = reconstruct(model, small, plan, data, on_layer=fits.append)
    assert [fit.tensor for fit in fits] == ["stem.weight", "conv.weight", "head.weight"]
    assert output_gap(model, fitted, [pictures(64, 99)]) < 0.7 * output_gap(model, small, [pictures(64, 99)])
    assert not set(named_tensors(fitted).tensors) & {"block.conv1.weight"}


def test_a_plan_made_in_two_steps() -> None:
    model = calibrated(Residual((8, 12, 16)))
    data, unseen = [pictures(32, i) for i in range(3)], [pictures(64, 99)]
    shorter_one, first = shorter(model, data[0][:2], ["layers.1"])
    rest = attrim.trace(shorter_one, data[0][:2])
    budget = attrim.Budget(macs=0.6 * attrim.trace(model, data[0][:2]).cost.macs() / rest.cost.macs())
    plan = first.then(attrim.allocate(rest, attrim.score(shorter_one, rest, "l2"), budget))
    small = attrim.apply(model, plan)
    fitted = quiet(reconstruct, model, small, plan, data)
    assert plan.provenance["macs_after"] <= 0.6 * plan.provenance["macs_before"]
    assert output_gap(model, fitted, unseen) < 0.5 * output_gap(model, small, unseen)
