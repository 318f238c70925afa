"""CPSCA: network and attention learn together, each layer keeps its share, and the attention goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attrim
from attrim.errors import BudgetError, InputError
from attrim.methods.cpsca import cpsca
from nets import Plain, Residual, filled


def batches(classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, classes, (n,), generator=generator))
        for n in (6, 6, 3)
    ]


def test_the_network_learns_with_the_attention_and_the_original_stays() -> None:
    model, data = filled(Plain()).eval(), batches(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    channels = attrim.trace(model, data[0][0])
    outcome = cpsca(model, channels, data, budget=attrim.Budget(channels=0.5), epochs=2, lr=0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trained = outcome.model_to_cut.state_dict()
    assert not torch.equal(trained["conv1.weight"], before["conv1.weight"])
    assert not torch.equal(trained["bn1.running_mean"], before["bn1.running_mean"])
    assert {g: note["kept"] for g, note in outcome.plan.groups.items()} == {"conv1": 4, "conv2": 6}
    for group, value in outcome.scores.values.items():
        kept = outcome.plan.cuts[f"{group}.weight"].keep[0]
        assert set(kept) == set(value.topk(len(kept)).indices.tolist())
        assert bool(((value >= 0) & (value < 1)).all())
    small = attrim.apply(outcome.model_to_cut, outcome.plan)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert attrim.verify(outcome.model_to_cut, small, outcome.plan, data[0][0]).exact


def test_gates_stand_between_layer_and_norm_in_the_first_layer_of_each_block() -> None:
    model, data = filled(Residual(blocks=1)).eval(), batches(10)
    outcome = cpsca(
        model,
        attrim.trace(model, data[0][0]),
        data,
        ratios={"layers.0.*": 0.6, "layers.1.*": 0.29},
        epochs=1,
        base="original",
    )
    assert outcome.gates is not None
    assert {p.module for places in outcome.gates.places.values() for p in places} == {
        f"layers.{i}.conv1" for i in range(3)
    }
    kept = {g: note["kept"] for g, note in outcome.plan.groups.items() if note["kept"] < note["size"]}
    assert kept == {"layers.0.conv1": int(16 * 0.4), "layers.1.conv1": int(32 * 0.71)}
    assert outcome.model_to_cut is model
    (unit, *_) = outcome.gates.units.values()
    assert sum(p.numel() for p in unit.parameters()) == 2 * 16 + 2 * 16  # 2C + 2G with G = 16


def test_it_resumes_with_the_network_that_was_trained(tmp_path: Path) -> None:
    model, data = filled(Plain()).eval(), batches(5)
    channels = attrim.trace(model, data[0][0])
    options: dict[str, Any] = {"budget": attrim.Budget(channels=0.5), "epochs": 1, "folder": tmp_path}
    one = cpsca(model, channels, data, **options)
    two = cpsca(model, channels, data, resume=True, **options)
    first, second = one.model_to_cut.state_dict(), two.model_to_cut.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert one.plan.cuts == two.plan.cuts


def test_pruned_and_recovered_by_one_call() -> None:
    model, data = filled(Plain()).eval(), batches(5)
    result = attrim.prune(
        model,
        data[0][0],
        method="cpsca",
        budget=attrim.Budget(macs=0.6),
        data=data,
        epochs=1,
        recover="free",
        holdout=data,
    )
    assert result.verification is not None
    assert result.verification.ok
    steps = [s["step"] for s in result.steps]
    assert steps[:6] == ["dense", "gates", "gate training", "attention", "trained", "cut"]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({}, InputError, "either budget="),
        ({"budget": attrim.Budget(macs=0.5), "ratios": {"*": 0.5}}, InputError, "either budget="),
        ({"ratios": {"*": 0.5}, "base": "mine"}, InputError, "base='trained' or 'original'"),
        ({"ratios": {"*": 1.0}}, BudgetError, r"in \[0, 1\), found '\*': 1.0"),
        ({"ratios": {"layer9.*": 0.5}}, InputError, r"the glob 'layer9.\*' names no scored group"),
    ],
)
def test_wrong_options_are_named_before_anything_is_trained(
    options: dict[str, Any], kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attrim.methods.cpsca.trained_gates", None)
    model, data = filled(Plain()).eval(), batches(5)
    with pytest.raises(kind, match=text):
        cpsca(model, attrim.trace(model, data[0][0]), data, epochs=1, **options)
