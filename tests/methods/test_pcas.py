"""PCAS: the acceptance tests of the method, each on a network small enough to be sure of."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import BudgetError, CheckpointError, CriterionError, InputError
from attrim.methods.attention import AttentionStatistics, read_attention
from attrim.methods.gate_training import trained_gates
from attrim.methods.pcas import pcas
from attrim.methods.ratio import plan_by_ratio
from attrim.methods.table import METHODS
from attrim.modules.gates import Gates
from nets import Mobile, Plain, Residual, filled

SIZES = (6, 6, 3)


def batches(classes: int = 5, seed: int = 0, side: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, side, side, generator=generator), torch.randint(0, classes, (n,), generator=generator))
        for n in SIZES
    ]


def setting(network: type[nn.Module] = Plain, **options: Any) -> tuple[nn.Module, attrim.ChannelMap, list[Any]]:
    model = filled(network(**options)).eval()
    data = batches(10 if network is not Plain else 5)
    return model, attrim.trace(model, data[0][0]), data


def test_the_base_learns_nothing_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, channels, data = setting(Residual)
    model.train()
    before = copy.deepcopy(model.state_dict())
    bases: list[nn.Module] = []

    def watched(base: nn.Module, *args: Any, **options: Any) -> Any:
        result = trained_gates(base, *args, **options)
        bases.append(result[0])
        return result

    monkeypatch.setattr("attrim.methods.pcas.trained_gates", watched)
    outcome = pcas(model, channels, data, ratio=0.3, epochs=2, policy="tied")
    assert outcome.model_to_cut is model is bases[0]
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = Gates(model, channels, policy="tied", example=data[0])
    assert outcome.gates is not None
    moved = [not torch.equal(a, b) for a, b in zip(fresh.parameters(), outcome.gates.parameters(), strict=True)]
    assert all(moved)


def test_only_gates_have_gradients_and_the_copy_in_training_stays_frozen() -> None:
    from attrim.modules.gates import Gated

    model, channels, data = setting()
    gated = Gated(copy.deepcopy(model), Gates(model, channels, example=data[0]), frozen=True).train()
    before = copy.deepcopy(gated.base.state_dict())
    assert gated.gates.training
    assert not any(module.training for module in gated.base.modules())
    for images, labels in data:
        nn.functional.cross_entropy(gated(images), labels).backward()
    assert all(p.grad is None for p in gated.base.parameters())
    assert all(p.grad is not None for p in gated.gates.parameters())
    assert all(torch.equal(value, before[name]) for name, value in gated.base.state_dict().items())


def test_statistics_are_means_over_samples_whatever_the_batches() -> None:
    model, channels, data = setting()
    model.double()
    gates = Gates(model, channels, example=data[0][0].double(), seed=4)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    doubled = [(x.double(), y) for x, y in data]
    found = read_attention(model, gates, doubled)
    images, labels = torch.cat([x for x, _ in doubled]), torch.cat([y for _, y in doubled])
    each = gates.features(model, images)
    assert found.samples == sum(SIZES)
    for group, values in each.items():
        assert torch.allclose(found.mean[group], values.mean(1), atol=1e-12, rtol=0)
        assert torch.allclose(found.second[group], values.square().mean(1), atol=1e-12, rtol=0)
        for label in range(5):
            mine = values[:, labels == label].mean(1)
            assert torch.allclose(found.by_class[group][label], mine, atol=1e-12, rtol=0, equal_nan=True)
        assert torch.allclose(found.deviation()[group], values.std(1, unbiased=False), atol=1e-9)
    assert found.class_counts is not None
    assert found.class_counts.tolist() == [int((labels == k).sum()) for k in range(5)]
    batchwise = torch.stack([gates.features(model, x)["conv1"].mean(1) for x, _ in doubled]).mean(0)
    assert not torch.allclose(found.mean["conv1"], batchwise, atol=1e-6)  # the last batch is short


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.5, 0.75])
def test_exactly_the_floor_of_ratio_times_channels_goes_with_many_ties(ratio: float) -> None:
    _, channels, _ = setting(Plain, first=20, second=80)
    scores = attrim.Scores({"conv1": [0.0] * 20, "conv2": [0.0] * 60 + [0.5] * 20}, "ties")
    plan = plan_by_ratio(channels, scores, ratio, attrim.Budget(channels=1.0, min_keep=1, frozen=()))
    gone = sum(g["size"] - g["kept"] for g in plan.groups.values())
    assert gone == math.floor(ratio * 100 + 1e-9)
    assert plan.provenance["threshold"] == 0.0


def test_equal_scores_go_from_the_highest_index_on() -> None:
    _, channels, _ = setting()
    plan = plan_by_ratio(channels, attrim.Scores({"conv1": [1.0] * 8, "conv2": [1.0] * 12}, "ties"), 0.25)
    assert plan.groups["conv1"]["kept"] == 8
    assert plan.cuts["conv2.weight"].keep[0] == tuple(range(7))


def test_masks_are_nested_and_floors_hold() -> None:
    _, channels, _ = setting(Plain, first=20, second=80)
    generator = torch.Generator().manual_seed(0)
    scores = attrim.Scores(
        {"conv1": torch.rand(20, generator=generator) * 0.1, "conv2": torch.rand(80, generator=generator)}, "random"
    )
    before = {"conv1": set(range(20)), "conv2": set(range(80))}
    for ratio in (0.25, 0.4, 0.6, 0.8, 0.95):
        cuts = plan_by_ratio(channels, scores, ratio).cuts
        for group in ("conv1", "conv2"):
            kept = set(cuts[f"{group}.weight"].keep[0])
            assert kept < before[group] or (group == "conv1" and len(kept) == 1)
            assert len(kept) >= math.ceil(0.05 * channels[group].size)
            assert kept == set(scores.values[group].topk(len(kept)).indices.tolist())
            before[group] = kept
    assert len(before["conv1"]) == 1


@pytest.mark.parametrize("policy", ["internal", "tied"])
def test_the_masked_network_is_the_sliced_one_and_has_the_original_layers_only(policy: str) -> None:
    model, channels, data = setting(Residual)
    model.double()
    doubled = [(x.double(), y) for x, y in data]
    outcome = pcas(model, channels, doubled, ratio=0.4, epochs=1, policy=policy)  # type: ignore[arg-type]
    small = attrim.apply(outcome.model_to_cut, outcome.plan)
    check = attrim.verify(model, small, outcome.plan, data[0][0].double())
    assert check.ok
    assert check.exact
    assert check.max_error < 1e-9
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    sizes = sum(channels[g].size for g in outcome.scores.values)
    gone = outcome.plan.provenance["channels_before"] - outcome.plan.provenance["channels_after"]
    assert gone <= math.floor(0.4 * sizes)
    assert ("conv1" in outcome.scores.values) == (policy == "tied")


def test_scaled_softmax_attends_with_one_on_average() -> None:
    model, channels, data = setting(Residual)
    outcome = pcas(model, channels, data, ratio=0.2, epochs=3, lr=0.5, act="softmax")
    for mean in outcome.statistics["attention"].mean.values():
        assert torch.allclose(mean.mean(1), torch.ones(len(mean), dtype=torch.float64), atol=1e-6)
    assert outcome.gates is not None
    unit = next(iter(outcome.gates.units.values()))
    assert float(unit.sharpness) == pytest.approx(4.0)
    assert max(float(mean.std()) for mean in outcome.statistics["attention"].mean.values()) > 1e-3


def test_after_the_rounds_the_ratio_is_reached() -> None:
    model, _, data = setting(Residual)
    result = attrim.prune_rounds(
        model, data[0][0], method="pcas", budget=attrim.Budget(channels=0.4, min_keep=1), rounds=3, data=data, epochs=1
    )
    whole = result.before.channels
    assert 0.4 * whole - 1 < result.after.channels <= 0.4 * whole
    assert result.verification is not None
    assert result.verification.ok


def test_resnet50_needs_its_residual_stream_for_the_papers_figures() -> None:
    """-88.1 % of the parameters at most inside the blocks; -91 % with everything at three tenths."""
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        shapes = models.resnet50(num_classes=10)
    model = shapes.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        for buffer in model.buffers():
            buffer.fill_(1)
    x = torch.zeros(1, 3, 32, 32)
    channels = attrim.trace(model, x)
    gates = Gates(model, channels, policy="tied", example=x)
    assert len(gates.places) == len(channels)
    inner = set(channels.groups) - gates.streams
    assert len(inner) == 33  # the stem and two in each of the 16 blocks
    weights = {n: s for n, s in channels.shapes.items() if len(s) > 1}
    total = sum(math.prod(s) for s in weights.values())
    blocks = {g for g in inner if g != "conv1"}
    gone = {m.axis.tensor for g in blocks for m in channels[g].members}
    left = sum(math.prod(shape) for name, shape in weights.items() if name not in gone)
    assert round(100 * (1 - left / total), 1) == 88.1
    kept = {g.id: round(0.3 * g.size) for g in channels}
    assert round(100 * (1 - channels.cost.params(kept) / channels.cost.params()), 1) == pytest.approx(91.0, abs=0.1)


def test_channels_that_are_always_zero_go_first() -> None:
    model, channels, data = setting(Residual)
    inner = model.layers[0]  # type: ignore[union-attr]
    with torch.no_grad():
        inner.bn1.weight[[2, 5]] = 0.0  # type: ignore[union-attr]
        inner.bn1.bias[2], inner.bn1.bias[5] = 0.0, -0.7  # type: ignore[union-attr]
    outcome = pcas(model, channels, data, ratio=0.0, epochs=1)
    score = outcome.scores.values["layers.0.conv1"]
    alive = outcome.statistics["attention"].alive["layers.0.conv1"][0]
    assert score[2] == score[5] == 0
    assert not alive[2]
    assert not alive[5]  # it is negative there, and only a relu reads it
    assert bool(((score > 0) == alive).all())
    assert int(alive.sum()) > 8


def test_any_loss_and_any_budget() -> None:
    model, channels, _ = setting()
    data = [(x, torch.zeros(len(x), 5)) for x, _ in batches()]
    calls = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(batch[1].shape)
        return (outputs - batch[1]).square().mean()

    outcome = pcas(model, channels, data, budget=attrim.Budget(params=0.5), loss=loss, epochs=1)
    assert sorted(tuple(shape) for shape in calls) == [(3, 5), (6, 5), (6, 5)]
    assert outcome.plan.provenance["params_after"] / outcome.plan.provenance["params_before"] <= 0.5
    assert outcome.statistics["attention"].by_class == {}


def test_folding_keeps_what_the_gates_have_learned_on_average() -> None:
    model, channels, data = setting(Mobile)
    outcome = pcas(model, channels, data, ratio=0.2, epochs=2, lr=0.5, end="fold")
    assert outcome.model_to_cut is not model
    assert outcome.gates is not None
    factors = outcome.statistics["attention"].factors()
    with torch.no_grad(), outcome.gates.attached(model, fixed=factors):
        expected = model(data[0][0])
    assert torch.allclose(outcome.model_to_cut(data[0][0]), expected, atol=1e-5)
    assert not torch.allclose(model(data[0][0]), expected, atol=1e-4)


def test_a_run_goes_on_from_every_stage_to_the_same_result(tmp_path: Path) -> None:
    model, channels, data = setting()
    options: dict[str, Any] = {"ratio": 0.4, "epochs": 3, "seed": 5}
    whole = pcas(model, channels, data, folder=tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def kill_after(epoch: int) -> Any:
        def told(report: Any) -> None:
            if report["epoch"] == epoch:
                raise Killed

        return told

    folder = tmp_path / "cut short"
    with pytest.raises(Killed):
        pcas(model, channels, data, folder=folder, on_epoch=kill_after(2), **options)
    with pytest.raises(CheckpointError, match="resume=True"):
        pcas(model, channels, data, folder=folder, **options)
    patched = pytest.MonkeyPatch()
    patched.setattr("attrim.methods.gate_training.read_attention", _raise(Killed))
    with pytest.raises(Killed):
        pcas(model, channels, data, folder=folder, resume=True, **options)
    patched.undo()
    assert (folder / "gates.safetensors").is_file()
    resumed = pcas(model, channels, data, folder=folder, resume=True, **options)
    read = pcas(model, channels, data, folder=folder, resume=True, **options)
    for other in (resumed, read):
        assert all(torch.equal(v, other.scores.values[g]) for g, v in whole.scores.values.items())
        assert other.plan.cuts == whole.plan.cuts
    assert {"attention.safetensors", "gates.safetensors", "stages.json"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob("checkpoint-*"))
    with pytest.raises(CheckpointError, match="epochs=3, found epochs=4"):
        pcas(model, channels, data, folder=folder, resume=True, **{**options, "epochs": 4})


def _raise(kind: type[Exception]) -> Any:
    def call(*args: Any, **options: Any) -> None:
        raise kind

    return call


def test_the_same_seed_gives_the_same_scores_and_another_seed_others() -> None:
    model, channels, data = setting()
    one, two, other = (
        pcas(model, channels, data, ratio=0.2, epochs=1, seed=s).scores.values["conv2"] for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    model, channels, data = setting()
    found = read_attention(model, Gates(model, channels, example=data[0]), data)
    found.save(tmp_path / "a.safetensors")
    again = AttentionStatistics.load(tmp_path / "a.safetensors")
    assert again.samples == found.samples
    assert all(torch.equal(again.second[g], v) for g, v in found.second.items())
    assert all(torch.equal(again.alive[g], v) for g, v in found.alive.items())
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        AttentionStatistics.load(tmp_path / "a.safetensors")


def test_prune_and_score_know_the_method() -> None:
    model, channels, data = setting()
    result = attrim.prune(model, data[0][0], method="pcas", budget=attrim.Budget(macs=0.5), data=data, epochs=1)
    assert result.verification is not None
    assert result.verification.ok
    assert [s["step"] for s in result.steps] == ["gates", "gate training", "attention", "cut", "verify"]
    assert result.outcome is not None
    scores = attrim.score(model, channels, "pcas", data, epochs=1)
    assert scores.criterion == "pcas"
    assert all(torch.equal(v, result.outcome.scores.values[g]) for g, v in scores.values.items())


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, InputError, "how small"),
        ({"ratio": 1.0}, BudgetError, r"ratio: expected .* \[0, 1\), found 1.0"),
        ({"ratio": 0.5, "budget": attrim.Budget(macs=0.5)}, InputError, "says something else"),
        ({"ratio": 0.5, "act": "tanh"}, InputError, "act: expected one of double, sigmoid, softmax"),
        ({"ratio": 0.5, "tap": "relu"}, InputError, "point: expected one of post, pre, conv"),
        ({"budget": attrim.Budget(macs=0.001)}, BudgetError, "macs"),
    ],
)
def test_wrong_options_are_named_before_anything_is_trained(
    options: dict[str, Any], kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attrim.methods.gate_training.finetune", _raise(RuntimeError))
    model, channels, data = setting()
    with pytest.raises(kind, match=text):
        pcas(model, channels, data, **options)


def test_data_are_needed_and_gone_through_again() -> None:
    model, channels, data = setting()
    with pytest.raises(CriterionError, match="and there is none"):
        pcas(model, channels, None, ratio=0.1)
    with pytest.raises(CriterionError, match="found a generator"):
        pcas(model, channels, iter(data), ratio=0.1)
    with pytest.raises(CriterionError, match="has no option 'epoch'"):
        attrim.score(model, channels, "pcas", data, epoch=1)
    assert METHODS["pcas"].options["epochs"] == 10
