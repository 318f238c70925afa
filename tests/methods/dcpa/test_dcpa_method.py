"""DCP-A as a method: from a network to a proved plan within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attrim
from attrim.errors import BudgetError, CriterionError, InputError
from attrim.methods.dcpa import dcpa
from attrim.methods.dcpa.stage2 import reference
from attrim.methods.table import METHODS
from nets import Mobile, Plain, Residual, filled


def batches(count: int = 4, size: int = 12, side: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, side, side, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Residual, {}),
        (Residual, {"kind": "xattn", "policy": "tied"}),
        (Residual, {"kind": "free", "share": "block", "policy": "tied", "sampling": "soft", "cost": "tas"}),
        (Residual, {"sampling": "tas", "cost": "dmcp"}),
        (Residual, {"space": "channel", "cost": "one_sided"}),
        (Mobile, {"space": "channel", "kind": "xattn"}),
        (Mobile, {"order": "prefix", "entropy": 0.3}),
        (Mobile, {"kind": "uniform"}),
        (Plain, {"kind": "random", "candidates": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}),
    ],
)
def test_every_kind_ends_within_the_budget_and_is_proved(network: type, options: dict[str, Any]) -> None:
    data = batches(side=16 if network is Mobile else 8)
    result = attrim.prune(
        filled(network()),
        data[0][0],
        method="dcpa",
        budget=attrim.Budget(macs=0.6),
        data=data,
        epochs=2,
        warmup=0.5,
        **options,
    )
    assert result.verification is not None
    assert result.verification.ok
    share = result.after.macs / result.before.macs
    step = 0.1 if network is Plain else 0.01
    assert 0.6 - step <= share <= 0.6
    epochs = [s for s in result.steps if s["step"] == "search"]
    assert [e["warm-up"] for e in epochs] == [True, options.get("kind") in ("uniform", "random")]
    assert all(e["target"] == pytest.approx({"macs": 0.6}, abs=1e-3) for e in epochs)


def test_the_network_given_is_not_changed_and_the_searched_one_has_learned() -> None:
    model, data = filled(Residual()), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channels = attrim.trace(model, data[0][0])
    outcome = dcpa(model, channels, data, budget=attrim.Budget(macs=0.5), epochs=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = outcome.model_to_cut.state_dict()
    assert not torch.equal(moved["layers.0.conv1.weight"], before["layers.0.conv1.weight"])
    assert not outcome.model_to_cut.training
    assert all(not module._forward_hooks for module in outcome.model_to_cut.modules())
    given = dcpa(model, channels, data, budget=attrim.Budget(macs=0.5), epochs=1, weights="given")
    assert given.model_to_cut is model
    scratch = dcpa(model, channels, data, budget=attrim.Budget(macs=0.5), epochs=0, weights="scratch").model_to_cut
    assert not torch.equal(scratch.state_dict()["fc.weight"], before["fc.weight"])
    assert float(scratch.state_dict()["bn1.weight"].std()) == 0


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"kind": "tanh"}, InputError, "kind: expected one of se, xattn, free, random, uniform"),
        ({"policy": "input_select"}, InputError, "policy: expected one of internal, tied"),
        ({"candidates": (0.5, 2.0)}, InputError, "candidates: expected kept fractions"),
        ({"space": "channel", "share": "block"}, InputError, "one by one"),
        ({"tau_low": 9.0}, InputError, "tau_low: expected at most"),
        ({"epochs": -1}, InputError, "epochs: expected an int >= 0"),
        ({"budget": attrim.Budget(macs=0.01)}, BudgetError, "smallest reachable"),
        ({"budget": None}, InputError, "how small"),
        ({"order": "nothing"}, CriterionError, "unknown criterion"),
    ],
)
def test_wrong_options_are_named_before_anything_is_trained(
    options: dict[str, Any], kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **more: Any) -> None:
        raise RuntimeError("trained")

    monkeypatch.setattr("attrim.methods.dcpa.searched.Search", never)
    model, data = filled(Residual()), batches()
    channels = attrim.trace(model, data[0][0])
    with pytest.raises(kind, match=text):
        dcpa(model, channels, data, **{"budget": attrim.Budget(macs=0.5), **options})


def test_it_is_in_the_table_with_all_its_options() -> None:
    assert METHODS["dcpa"].trains
    assert METHODS["dcpa"].options["kind"] == "se"
    assert {"kind", "space", "cost", "sampling", "tau_high", "policy_lr"} <= set(METHODS["dcpa"].options)


@pytest.mark.parametrize("recover", ["free", "finetune"])
def test_a_network_without_a_block_is_recovered(recover: Any) -> None:
    data = batches()
    model = filled(Residual())
    channels = attrim.trace(model, data[0][0])
    training = (
        {"training": {"epochs": 1, "attention": 5.0, "lr": 0.01, "channels": channels}} if recover == "finetune" else {}
    )
    result = attrim.prune(
        model, data[0][0], method="dcpa", budget=attrim.Budget(macs=0.6), data=data, epochs=2, candidates=(1.0,), fine=False,
        recover=recover, **training,
    )  # fmt: skip
    assert result.plan.drops
    assert result.verification is not None
    assert result.verification.ok
    assert result.after.macs <= 0.6 * result.before.macs
    steps = {s["step"]: s for s in result.steps}
    assert steps["reconstruct"]["layers"] > 0
    assert steps["reconstruct"]["gap"] < 1
    names = result.outcome.statistics["candidates"]
    found = {unit: len(p) for unit, p in steps["search"]["probabilities"].items()}
    assert found == {unit: len(own) for unit, own in names.items()}
    assert {own[0] for own in names.values()} == {"drop"}
    with torch.no_grad():
        assert bool(result.model(data[0][0]).isfinite().all())


def test_recovery_aims_at_the_better_of_the_given_and_the_searched_network() -> None:
    data = [(x, torch.zeros(len(x), dtype=torch.int64)) for x, _ in batches(2)]
    sure, unsure = filled(Residual()).eval(), filled(Residual(), seed=1).train()
    with torch.no_grad():
        sure.fc.weight.mul_(0), sure.fc.bias.fill_(-5.0)
        sure.fc.bias[0] = 5.0
    assert reference(sure, unsure, data, None, 0) is sure
    assert reference(unsure, sure, data, None, 0) is sure
    assert reference(sure, unsure, data, lambda outputs, batch: -F.cross_entropy(outputs, batch[1]), 0) is unsure
    assert unsure.training
    assert not sure.training
    measured = reference(unsure, sure, data, None, 2)
    assert measured is not sure
    assert torch.equal(measured.fc.bias, sure.fc.bias)
    assert not torch.equal(measured.bn1.running_mean, sure.bn1.running_mean)


def test_the_fit_is_made_to_that_network_and_the_cut_to_the_searched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fit(dense: Any, small: Any, plan: Any, data: Any, **more: Any) -> Any:
        seen.append(dense)
        return small

    monkeypatch.setattr("attrim.methods.pipeline.free_recovery", fit)
    data = batches()
    for weights in ("search", "given"):
        result = attrim.prune(
            filled(Residual()), data[0][0], method="dcpa", budget=attrim.Budget(macs=0.6), data=data, epochs=2, recover="free",
            weights=weights,
        )  # fmt: skip
        assert seen[-1] is result.outcome.aim
        assert (result.outcome.reference is None) == (weights == "given")
    assert seen[-1] is result.outcome.model_to_cut
