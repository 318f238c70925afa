"""One call from a network to a smaller, proved one: what comes back, what is refused, and that nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import Budget, ChannelMap, Scores
from attrim.errors import BudgetError, CriterionError, InputError
from attrim.recover import evaluate, output_gap
from nets import Attention, Plain, Residual, filled, image

pytestmark = pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")  # small networks are coarse


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(image(8, 3, 8, 8, seed=k), torch.arange(8) % 5) for k in range(count)]


def net() -> nn.Module:
    return filled(Residual((12, 16), 1, classes=5))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["l1", "l2", "lamp", "fpgm", "bn_scale", "random", "taylor", "obs", "refit"])
def test_every_kind_of_criterion_end_to_end(method: str) -> None:
    model = net()
    result = attrim.prune(model, image(), method=method, budget=Budget(macs=0.5), data=batches())
    assert 0.48 <= result.after.macs / result.before.macs <= 0.5
    assert result.before.params == parameters(model)
    assert result.after.params == parameters(result.model)
    assert result.after.macs == attrim.trace(result.model, image()).cost.macs()
    assert result.after.channels == sum(note["kept"] for note in result.plan.groups.values())
    assert result.verification is not None
    assert (result.verification.ok, result.verification.exact) == (True, True)
    assert result.verification.max_error < 1e-12
    assert [s["step"] for s in result.steps] == ["cut", "verify"]
    assert result.steps[0]["criterion"] == result.plan.provenance["criterion"] == method
    assert result.steps[1] == {"step": "verify", "ok": True, "exact": True, "max_error": result.verification.max_error}
    assert result.channels.fingerprint == result.plan.fingerprint
    assert result.model(image()).shape == (2, 5)


def test_the_result_is_what_the_single_steps_give() -> None:
    model, budget = net(), Budget(params=0.5, min_keep=2)
    result = attrim.prune(model, image(), method="l2", budget=budget)
    channels = attrim.trace(model, image())
    plan = attrim.allocate(channels, attrim.score(model, channels, "l2"), budget)
    assert result.plan.to_json() == plan.to_json()
    small = attrim.apply(model, plan)
    for (name, a), (_, b) in zip(small.state_dict().items(), result.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert attrim.verify(model, result.model, result.plan, image()).ok


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    plans = [
        attrim.prune(net(), image(), method="random", budget=Budget(macs=0.5), seed=seed).plan.to_json()
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1]
    assert plans[0]["cuts"] != plans[2]["cuts"]


@pytest.mark.parametrize("recover", [None, "free", "finetune"])
def test_the_original_is_bitwise_unchanged(recover: Any) -> None:
    model = net().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    attrim.prune(model, image(), method="taylor", budget=Budget(macs=0.5), data=batches(), recover=recover)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_own_criterion_is_called_once_with_model_map_and_data() -> None:
    calls: list[Any] = []

    def last_first(model: nn.Module, channels: ChannelMap, data: Any) -> Scores:
        calls.append((model, channels, data))
        return Scores({g.id: range(g.size) for g in channels}, "last first")

    model, data = filled(Plain()), batches(1)
    result = attrim.prune(model, image(), method=last_first, budget=Budget(channels=0.5), data=data)
    assert len(calls) == 1
    assert calls[0][0] is model
    assert calls[0][1].fingerprint == result.plan.fingerprint
    assert calls[0][2] is data
    assert result.plan.provenance["criterion"] == "last first"
    for group in result.plan.groups:
        kept, size = result.plan.groups[group]["kept"], result.plan.groups[group]["size"]
        assert result.plan.cuts[f"{group}.weight"].keep[0] == tuple(range(size - kept, size))


def test_options_go_to_the_criterion() -> None:
    model = net()
    mean, largest = (
        attrim.prune(model, image(), method="l2", budget=Budget(macs=0.5), reduction=r).plan for r in ("mean", "max")
    )
    assert mean.cuts != largest.cuts
    with pytest.raises(CriterionError, match="criterion 'l2' has no option 'temperature'"):
        attrim.prune(model, image(), method="l2", budget=Budget(macs=0.5), temperature=2)


def test_free_recovery_comes_closer_to_the_dense_network() -> None:
    model = net()
    cut = attrim.prune(model, image(), budget=Budget(macs=0.5)).model
    result = attrim.prune(model, image(), budget=Budget(macs=0.5), data=batches(), recover="free")
    assert [s["step"] for s in result.steps] == ["cut", "verify", "reconstruct", "recalibrate"]
    refit, measured = result.steps[2:]
    assert refit["layers"] > 0
    assert measured["taken"] == (measured["gap"] < refit["gap"])
    assert min(refit["gap"], measured["gap"]) < 0.7 * output_gap(model, cut, batches())
    assert min(refit["gap"], measured["gap"]) == pytest.approx(output_gap(model, result.model, batches()))
    assert {k: v.shape for k, v in result.model.state_dict().items()} == {
        k: v.shape for k, v in cut.state_dict().items()
    }


def test_every_step_is_judged_where_there_are_labels() -> None:
    model = net()
    labelled = [(x, model.eval()(x).argmax(1)) for x, _ in batches()]
    result = attrim.prune(
        model, image(), budget=Budget(macs=0.5), data=batches(), recover="finetune", holdout=labelled,
        training={"epochs": 1},
    )  # fmt: skip
    judged = {s["step"]: s.get("accuracy") for s in result.steps}
    assert list(judged) == ["dense", "cut", "verify", "reconstruct", "recalibrate", "finetune"]
    assert judged["dense"] == 1.0
    assert judged["verify"] is None
    assert judged["cut"] == evaluate(attrim.apply(model, result.plan), labelled)
    assert judged["finetune"] == evaluate(result.model, labelled)


def test_fine_tuning_comes_after_the_proof() -> None:
    result = attrim.prune(net(), image(), budget=Budget(macs=0.5), data=batches(), recover="finetune")
    assert [s["step"] for s in result.steps] == ["cut", "verify", "reconstruct", "recalibrate", "finetune"]
    assert result.verification is not None
    assert result.verification.max_error < 1e-12
    assert all(p.isfinite().all() for p in result.model.parameters())


def test_the_proof_can_be_switched_off() -> None:
    result = attrim.prune(net(), image(), budget=Budget(macs=0.5), verify=False)
    assert result.verification is None
    assert [s["step"] for s in result.steps] == ["cut"]
    assert str(result).endswith("not verified")


def test_inexact_cuts_are_marked_in_the_result() -> None:
    result = attrim.prune(filled(Attention()), image(2, 7, 12), budget=Budget(params=0.6, scope="group"))
    assert result.verification is not None
    assert (result.verification.ok, result.verification.exact) == (True, False)
    assert result.verification.effects == {"layer norm statistics": ("embed.weight:0",)}
    assert result.steps[1]["exact"] is False
    assert result.model.num_heads == result.plan.attributes[""]["num_heads"].after < 4


def test_the_result_prints_costs_and_proof() -> None:
    result = attrim.prune(net(), image(), budget=Budget(macs=0.5))
    lines = str(result).splitlines()
    before, after = result.before.macs, result.after.macs
    assert lines[0].split() == ["macs", f"{before:,}", "->", f"{after:,}", f"({100 * after / before:.1f}", "%", "kept)"]
    assert lines[-1] == str(result.verification)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown method": ({"method": "l3"}, CriterionError, "unknown criterion 'l3'. Did you mean"),
    "a method of another kind": ({"method": 3}, CriterionError, "expected a name (random, l1, l2"),
    "a method without its data": ({"method": "taylor"}, CriterionError, "criterion 'taylor' needs data"),
    "recovery without data": ({"recover": "free"}, InputError, "recover='free' needs data. Pass data=loader"),
    "fine-tuning without data": (
        {"recover": "finetune"},
        InputError,
        "recover='finetune' needs data. Pass data=loader",
    ),
    "an unknown recovery": (
        {"recover": "full"},
        InputError,
        "recover: expected None, 'free' or 'finetune', found 'full'",
    ),
    "a generator for recovery": (
        {"recover": "free", "data": (b for b in [image()])},
        InputError,
        "data: recovery goes through the batches several times, found a generator",
    ),
    "training options without training": (
        {"training": {"epochs": 2}},
        InputError,
        "needs recover='finetune', found recover=None",
    ),
    "an unreachable budget": ({"budget": Budget(macs=0.001)}, BudgetError, "smallest reachable"),
    "a number as budget": ({"budget": 0.5}, InputError, "budget: expected an attrim.Budget, found 0.5"),
    "a frozen network": ({"budget": Budget(macs=0.5, frozen=("*",))}, BudgetError, "every group is frozen"),
    "a typo in frozen": (
        {"budget": Budget(macs=0.5, frozen=("fc.wieght",))},
        BudgetError,
        "matches no axis of the model",
    ),
}


@pytest.mark.parametrize(("options", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        attrim.prune(model, image(), **{"budget": Budget(macs=0.5), **options})
    assert text in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a class": (lambda: Plain, "Call the class to make an instance"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), "nothing to prune"),
    "half precision": (lambda: Plain().half(), "float16 on the CPU"),
}


@pytest.mark.parametrize(("make", "text"), MODELS.values(), ids=MODELS)
def test_models_are_checked_at_the_door(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        attrim.prune(make(), image(), budget=Budget(macs=0.5))


def test_pruning_again_goes_on_from_the_smaller_network() -> None:
    first = attrim.prune(net(), image(), budget=Budget(macs=0.6))
    second = attrim.prune(first.model, image(), budget=Budget(macs=0.6))
    assert second.before.macs == first.after.macs
    whole = first.plan.then(second.plan)
    small = attrim.apply(net(), whole)
    for (name, a), (_, b) in zip(small.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert whole.provenance["macs_after"] / whole.provenance["macs_before"] == pytest.approx(0.36, abs=0.02)
