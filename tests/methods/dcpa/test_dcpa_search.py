"""The search: what learns from what, that it finds a useless block, and that it goes on after being killed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attrim
from attrim.errors import CheckpointError, InputError
from attrim.methods.dcpa import dcpa, train_derived
from attrim.methods.dcpa.search import Search
from nets import Plain, Residual, filled


def loader(count: int = 48, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = (
        torch.randn(count, 3, 8, 8, generator=generator),
        torch.randint(0, 5, (count,), generator=generator),
    )
    order = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(images, labels), 8, shuffle=True, generator=order)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("kind", "steps"), [("se", 5), ("free", 7), ("xattn", 2)])
def test_a_killed_search_goes_on_to_the_same_result_bit_by_bit(
    kind: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches an epoch; the kill falls within the second or third, between checkpoints of every batch."""
    model = filled(Residual((8, 12), 1, 5))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    options: dict[str, Any] = {"budget": attrim.Budget(macs=0.5), "kind": kind, "epochs": 4, "warmup": 0.25, "seed": 3}
    whole = dcpa(model, channels, loader(), **options)
    batch, done = Search._policy_batch, [0]

    def dying(self: Search, *args: Any) -> None:
        done[0] += 1
        if done[0] > steps:
            raise Killed
        batch(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Search, "_policy_batch", dying)
        with pytest.raises(Killed):
            dcpa(model, channels, loader(), folder=tmp_path / "run", every_minutes=1e-9, **options)
    with pytest.raises(CheckpointError, match="resume=True"):
        dcpa(model, channels, loader(), folder=tmp_path / "run", **options)
    torch.manual_seed(99)
    resumed = dcpa(model, channels, loader(), folder=tmp_path / "run", resume=True, every_minutes=1e-9, **options)
    read = dcpa(model, channels, loader(), folder=tmp_path / "run", resume=True, **options)
    for other in (resumed, read):
        ours, theirs = whole.statistics["searched"], other.statistics["searched"]
        assert all(torch.equal(a, b) for a, b in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True))
        assert torch.equal(ours.policy.z, theirs.policy.z)
        base = theirs.base.state_dict()
        assert all(torch.equal(tensor, base[name]) for name, tensor in ours.base.state_dict().items())
        assert other.plan.cuts == whole.plan.cuts
    timeless = [{k: v for k, v in r.items() if k != "seconds"} for r in whole.statistics["epochs"]]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in resumed.statistics["epochs"]] == timeless
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in read.statistics["epochs"]] == timeless
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    with pytest.raises(CheckpointError, match="policy_lr"):
        dcpa(model, channels, loader(), folder=tmp_path / "run", resume=True, policy_lr=0.5, **options)


def test_figures_of_every_epoch(tmp_path: Path) -> None:
    model = filled(Residual((8, 12), 1, 5))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    told: list[Any] = []
    holdout = list(loader(seed=1))
    outcome = dcpa(
        model, channels, loader(), budget=attrim.Budget(macs=0.5), epochs=3, holdout=holdout, folder=tmp_path,
        on_epoch=told.append,
    )  # fmt: skip
    assert [e["epoch"] for e in told] == [1, 2, 3]
    assert [e["tau"] for e in told] == pytest.approx([5.0, 3.775, 1.325])
    last = told[-1]
    assert {"loss", "accuracy", "policy_loss", "policy_loss_cost", "policy_accuracy", "holdout_accuracy"} <= set(last)
    assert {"expected", "likeliest", "target", "widths", "probabilities", "entropy", "certainty", "dropped"} <= set(
        last
    )
    assert 0 <= last["holdout_accuracy"] <= 1
    assert list(outcome.statistics["epochs"]) == told
    lines = (tmp_path / "searching" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == told
    assert [s["step"] for s in outcome.log] == ["search space", "search", "search", "search", "derived"]


def test_weights_and_policy_learn_in_turn_from_different_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[float]] = {"weights": set(), "policy": set()}
    from attrim.methods.dcpa import steps

    learn, decide = steps.WeightStep.__call__, steps.PolicyStep.__call__

    def weights(self: Any, portion: Any, *args: Any) -> Any:
        seen["weights"] |= set(portion.batch.args[0][:, 0, 0, 0].tolist())
        before = copy.deepcopy(self.policy.state_dict())
        figures = learn(self, portion, *args)
        assert all(p.grad is None for p in self.policy.parameters())
        after = self.policy.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items() if "theta" in k or "information" in k)
        assert not torch.equal(before["z"], after["z"])
        return figures

    def policy(self: Any, portion: Any, *args: Any) -> Any:
        seen["policy"] |= set(portion.batch.args[0][:, 0, 0, 0].tolist())
        before = copy.deepcopy(self.base.state_dict())
        z = self.policy.z.clone()
        figures = decide(self, portion, *args)
        assert all(p.grad is None and p.requires_grad for p in self.base.parameters())
        assert all(torch.equal(v, before[k]) for k, v in self.base.state_dict().items())  # running statistics as well
        assert torch.equal(self.policy.z, z)
        return figures

    monkeypatch.setattr(steps.WeightStep, "__call__", weights)
    monkeypatch.setattr(steps.PolicyStep, "__call__", policy)
    model = filled(Residual((8, 12), 1, 5))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    dcpa(model, channels, loader(), budget=attrim.Budget(macs=0.5), epochs=2, warmup=0.0)
    assert len(seen["weights"]) == len(seen["policy"]) == 24
    assert not seen["weights"] & seen["policy"]


@pytest.mark.parametrize("cost", ["abslog", "one_sided"])
def test_the_expected_cost_comes_to_the_budget(cost: str) -> None:
    model = filled(Residual((8, 12), 1, 5))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    outcome = dcpa(
        model, channels, loader(24), budget=attrim.Budget(macs=0.7), epochs=25, policy_lr=0.1, cost=cost, cost_weight=20.0,
        kind="free", policy="tied",
    )  # fmt: skip
    last = outcome.statistics["epochs"][-1]
    assert last["expected"]["macs"] == pytest.approx(0.7, abs=0.03) or (
        cost == "one_sided" and last["expected"]["macs"] < 0.7
    )
    first = outcome.statistics["epochs"][0]
    assert first["expected"]["macs"] < 0.6 or cost == "one_sided"


KINDS = ("se", "free", "xattn")


class Same(nn.Module):
    """One of several equal blocks; with ``on = 0`` its branch sees nothing and adds nothing, and costs as much."""

    def __init__(self, width: int, on: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.register_buffer("on", torch.tensor(on))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x * self.on)).relu()))
        return (x + inner).relu()


class Row(nn.Module):
    """Four equal blocks, of which one is useless."""

    def __init__(self, useless: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Same(width, float(i != useless)) for i in range(4)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x).relu()).mean((2, 3)))


SEEDS = [pytest.param(s, k, marks=[] if s == i else pytest.mark.slow) for i, k in enumerate(KINDS) for s in range(3)]


@pytest.mark.parametrize(("seed", "kind"), SEEDS)
def test_a_useless_block_is_dropped(seed: int, kind: str) -> None:
    """The labels are the network's own answers, so each of the other blocks is needed."""
    useless = 1 + seed % 3
    torch.manual_seed(seed)
    model = Row(useless)
    with torch.no_grad():
        model.fc.weight.mul_(8.0)
        for block in model.blocks:
            block.bn2.bias.zero_()
        images = torch.randn(192, 3, 6, 6)
        model.train()
        scores = model(images)
        model.fc.bias.sub_(scores.mean(0))
        labels = (scores - scores.mean(0)).argmax(1)
    channels = attrim.trace(model, images[:1])
    data = DataLoader(TensorDataset(images, labels), 32, shuffle=True, generator=torch.Generator().manual_seed(seed))
    outcome = dcpa(
        model, channels, data, budget=attrim.Budget(macs=0.77), kind=kind, epochs=16, warmup=0.0, lr=1e-4, policy_lr=0.02 if kind == "xattn" else 0.05,
        candidates=(1.0,), fine=False, seed=seed, order="prefix",
    )  # fmt: skip
    assert outcome.statistics["derived"].drops == (f"blocks.{useless}",)
    small = attrim.apply(outcome.model_to_cut, outcome.plan)
    check = attrim.verify(outcome.model_to_cut, small, outcome.plan, images[:2])
    assert check.ok
    assert isinstance(small.blocks[useless], nn.Identity)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = filled(Plain())
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"the loss is nan at epoch 1, step 1 of 3\. Start with a lower rate"):
        dcpa(
            model, channels, loader(), budget=attrim.Budget(macs=0.5), epochs=1,
            loss=lambda outputs, batch: outputs.sum() * float("nan"),
        )  # fmt: skip


def test_data_of_its_own_for_the_policy_and_a_loss_of_ones_own() -> None:
    model = filled(Plain())
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))

    def loss(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], label_smoothing=0.1)

    outcome = dcpa(
        model, channels, loader(16), budget=attrim.Budget(macs=0.5), epochs=2, loss=loss, policy_data=loader(24, seed=5)
    )
    assert len(outcome.statistics["epochs"]) == 2


def test_the_derived_network_is_trained_from_scratch_or_from_what_it_inherits() -> None:
    model = filled(Residual((8, 12), 1, 5))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    outcome = dcpa(model, channels, loader(), budget=attrim.Budget(macs=0.5), epochs=1)
    shapes = {n: t.shape for n, t in attrim.apply(outcome.model_to_cut, outcome.plan).state_dict().items()}
    made = [
        train_derived(outcome.model_to_cut, outcome.plan, loader(), scratch=scratch, teacher=teacher, epochs=1)
        for scratch in (True, False)
        for teacher in (None, model)
    ]
    assert all({n: t.shape for n, t in net.state_dict().items()} == shapes for net in made)
    weights = [net.fc.weight for net in made]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_several_budgets_from_one_search() -> None:
    model = filled(Residual((16, 32), 2, 5))
    channels = attrim.trace(model, torch.zeros(1, 3, 8, 8))
    searched = dcpa(model, channels, loader(), budget=attrim.Budget(macs=0.5), epochs=1).statistics["searched"]
    for share in (0.35, 0.5, 0.8):
        plan, derived = searched.plan(attrim.Budget(macs=share))
        assert 0 <= derived.slack <= 0.01
        base = searched.network(plan, list(loader()), 2)
        assert attrim.verify(base, attrim.apply(base, plan), plan, torch.zeros(1, 3, 8, 8)).ok
