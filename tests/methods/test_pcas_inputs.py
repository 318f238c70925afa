"""PCAS with input selection: streams keep their width, and each layer that reads one reads a part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.methods.attention import read_attention
from attrim.methods.pcas import pcas
from attrim.modules.gates import Gates
from attrim.modules.gates.streams import stream_inputs
from attrim.modules.input_groups import input_groups
from nets import Mobile, Plain, Residual, filled

READERS = ("layers.0.conv1", "layers.1.conv1", "layers.2.conv1", "layers.2.down.0", "layers.3.conv1", "fc")


def batches(classes: int = 10, side: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(n, 3, side, side, generator=generator).double(),
            torch.randint(0, classes, (n,), generator=generator),
        )
        for n in (6, 6, 3)
    ]


def setting() -> tuple[nn.Module, attrim.ChannelMap, list[tuple[Tensor, Tensor]]]:
    model, data = filled(Residual((8, 16), 2)).double(), batches()
    return model, attrim.trace(model, data[0][0]), data


def gated() -> tuple[nn.Module, attrim.ChannelMap, Gates, list[tuple[Tensor, Tensor]]]:
    model, channels, data = setting()
    free = stream_inputs(model, channels, data[0])
    return model, free, Gates(model, free, policy="input_select", example=data[0]), data


def test_gates_hang_in_front_of_the_readers_and_inside_the_blocks() -> None:
    _, free, gates, _ = gated()
    assert not gates.refused
    assert set(gates.places) == set(free.groups)
    before = {p.source for places in gates.places.values() for p in places if p.before}
    assert before == set(READERS)


def test_a_gate_changes_what_one_layer_reads_and_nothing_else() -> None:
    model, _, gates, data = gated()
    images = data[0][0]
    seen: dict[str, Tensor] = {}
    factors = torch.rand(8, dtype=torch.float64)
    handles = [
        model.layers[1].register_forward_pre_hook(lambda m, args: seen.update(stream=args[0].clone())),
        model.layers[1].down.register_forward_hook(lambda m, args, out: seen.update(shortcut=out.clone())),
        model.layers[1].conv1.register_forward_hook(lambda m, args, out: seen.update(out=out.clone())),
    ]
    with torch.no_grad(), gates.attached(model, fixed={"layers.1.conv1.in": factors}, inplace=True):
        model(images)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["shortcut"], seen["stream"])
    assert torch.allclose(seen["out"], model.layers[1].conv1(seen["stream"] * factors.view(1, -1, 1, 1)), rtol=1e-12)


def test_fresh_gates_change_nothing_and_constant_ones_fold_exactly() -> None:
    model, free, gates, data = gated()
    images = data[0][0]
    with gates.attached(model) as collected:
        assert torch.equal(model(images), (plain := model(images)))
        assert collected.attention["fc.in"][0].shape == (6, 16)
    assert torch.equal(model(images), plain)
    generator = torch.Generator().manual_seed(1)
    fixed = {id: torch.rand(free[id].size, generator=generator, dtype=torch.float64) for id in gates.places}
    with gates.attached(model, fixed=fixed):
        expected = model(images)
    folded = gates.fold(model, fixed)
    assert (folded(images) - expected).abs().max() < 1e-12
    assert torch.equal(folded.bn1.weight, model.bn1.weight)  # the stream itself takes no factor


def test_statistics_know_what_is_never_anything_but_zero() -> None:
    model, free, _, data = gated()
    with torch.no_grad():
        model.bn1.weight[3] = 0
        model.bn1.bias[3] = -1
    gates = Gates(model, free, policy="input_select", example=data[0])
    found = read_attention(model, gates, data)
    assert found.alive["layers.0.conv1.in"][0].tolist() == [c != 3 for c in range(8)]
    assert found.score()["layers.0.conv1.in"][3] == 0


@pytest.mark.parametrize("end", ["drop", "fold"])
def test_end_to_end_within_the_budget(end: str, tmp_path: Path) -> None:
    model, _, data = setting()
    result = attrim.prune(
        model,
        data[0][0],
        method="pcas",
        policy="input_select",
        end=end,
        budget=attrim.Budget(macs=0.3),
        data=data,
        epochs=2,
        lr=1.0,
        recover="finetune",
        training={"epochs": 1},
    )
    assert result.verification is not None
    assert result.verification.ok
    assert result.verification.max_error < 1e-9
    assert len(result.plan.selects) >= 3
    assert result.after.macs <= 0.3 * result.before.macs
    assert attrim.trace(result.model, data[0][0]).cost.macs() == result.after.macs
    assert result.model.bn1.num_features == 8
    assert result.outcome is not None
    assert set(result.outcome.scores.values) == set(result.channels.groups)
    attrim.save(result.model, result.plan, tmp_path)
    again = attrim.load(tmp_path, model=Residual((8, 16), 2).double().eval())
    assert torch.equal(again(data[0][0]), result.model.eval()(data[0][0]))


def test_rounds_select_from_what_was_selected() -> None:
    model, _, data = setting()
    result = attrim.prune_rounds(
        model,
        data[0][0],
        method="pcas",
        policy="input_select",
        budget=attrim.Budget(macs=0.2, min_keep=2),
        rounds=2,
        data=data,
        epochs=2,
        lr=2.0,
        recover="free",
    )
    assert result.verification is not None
    assert result.verification.ok
    assert result.after.macs <= 0.2 * result.before.macs
    assert attrim.trace(result.model, data[0][0]).cost.macs() == result.after.macs
    assert min(len(s.keep) for s in result.plan.selects.values()) >= 2


def test_without_streams_it_is_internal() -> None:
    model, data = filled(Plain()).double(), batches(classes=5)
    channels = attrim.trace(model, data[0][0])
    one, other = (pcas(model, channels, data, ratio=0.4, epochs=1, policy=p) for p in ("internal", "input_select"))
    assert one.plan == other.plan


def test_scores_go_with_the_map_of_inputs() -> None:
    model, channels, data = setting()
    free = input_groups(model, channels)
    scores = attrim.score(model, free, "pcas", data, epochs=1, policy="input_select")
    plan = attrim.allocate(free, scores, attrim.Budget(params=0.5))
    assert plan.provenance["params_after"] <= 0.5 * plan.provenance["params_before"]


def test_inverted_residuals() -> None:
    model, data = filled(Mobile()).double(), batches(side=16)
    result = attrim.prune(
        model, data[0][0], method="pcas", policy="input_select", budget=attrim.Budget(macs=0.5), data=data, epochs=1
    )
    assert result.verification is not None
    assert result.verification.ok
    assert result.channels.inputs
    assert result.after.macs <= 0.5 * result.before.macs


def selected() -> tuple[nn.Module, nn.Module, attrim.PruningPlan, list[Any]]:
    model, channels, data = setting()
    free = input_groups(model, channels)
    kept = {g.id: range(g.size // 4, g.size) for g in free}
    plan = attrim.plan_from_kept(free, kept)
    return model, attrim.apply(model, plan), plan, data


def gap(model: nn.Module, small: nn.Module, data: list[Any]) -> float:
    with torch.no_grad():
        return sum(float((model.eval()(x) - small.eval()(x)).square().sum()) for x, _ in data)


def test_layers_with_selected_inputs_are_fitted() -> None:
    model, small, plan, data = selected()
    fitted = attrim.recover.reconstruct(model, small, plan, data)
    assert gap(model, fitted, data) < 0.5 * gap(model, small, data)
    assert torch.equal(fitted.layers[1].conv1.positions, small.layers[1].conv1.positions)
    free = attrim.recover.free_recovery(model, small, plan, data)
    assert gap(model, free, data) <= gap(model, fitted, data) * (1 + 1e-9)


def test_means_of_what_is_not_read_any_more_go_into_the_next_norm() -> None:
    model, channels, data = setting()
    free = input_groups(model, channels)
    plan = attrim.plan_from_kept(free, {"fc.in": range(4, 16)})
    small = attrim.apply(model, plan)
    folded = attrim.recover.fold_bias(model, small, plan, data)
    features = [model.layers(model.bn1(model.conv1(x)).relu()).mean((2, 3)) for x, _ in data]
    mean = torch.cat(features).mean(0)[:4]
    expected = small.fc.bias + model.fc.weight[:, :4] @ mean
    assert torch.allclose(folded.fc.bias, expected, rtol=1e-9)


def test_recalibration() -> None:
    model, small, _, data = selected()
    recalibrated = attrim.recover.recalibrate(small, data)
    assert not torch.equal(recalibrated.layers[1].bn1.running_mean, small.layers[1].bn1.running_mean)
    assert recalibrated(data[0][0]).shape == model(data[0][0]).shape
