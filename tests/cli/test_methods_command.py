"""`attrim prune` with a method that trains: every option in the run's file, resumed at every stage, listed by name."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import attrim
from attrim.cli.models import build
from attrim.methods.table import METHODS
from attrim.recover import finetune, open_data
from attrim.ship import save_weights


@pytest.fixture
def trained(net, images, tmp_path) -> list[object]:
    """MODEL, weights and data of a network that tells dark from light."""
    torch.manual_seed(0)
    data = open_data(str(images), shape=(3, 8, 8), batch_size=16)
    model = finetune(build(net).model, data.batches("train", shuffle=True), epochs=4, lr=0.05)
    save_weights(model, tmp_path / "w.safetensors")
    return [net, "--weights", tmp_path / "w.safetensors", "--input", "1x3x8x8", "--data", images, "--batch-size", "16"]


def lines(folder) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_pcas_from_the_command_line(call, trained, net, tmp_path):
    out = tmp_path / "run"
    said = call(
        *("prune", *trained, "--method", "pcas", "--keep-macs", "0.5", "--option", "epochs=2", "--option", "lr=0.1"),
        *("--finetune-epochs", "1", "--device", "cpu", "--out", out),
    )
    assert said.status == 0, said.err
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["option"] == {**METHODS["pcas"].options, "epochs": 2, "lr": 0.1}
    found = [line["step"] for line in lines(out)]
    assert found[:6] == ["start", "dense", "gate training", "gate training", "gates", "attention"]
    assert found[-3:] == ["finetune", "finetuned", "final"]
    by_step = {line["step"]: line for line in lines(out)}
    assert by_step["attention"]["samples"] == 54  # 60 rows, six of them held out
    assert by_step["cut"]["verified"] is True
    assert sorted(p.name for p in (out / "method").glob("*.safetensors")) == [
        "attention.safetensors",
        "gates.safetensors",
    ]
    small = attrim.load(out, model=build(net).model)
    assert sum(p.numel() for p in small.parameters()) == by_step["final"]["params"][1]

    again = call("prune", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.status == 0, again.err
    for name in ("plan.json", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("pcas", "attrim.methods.gate_training.read_attention"),
        ("pcas", "attrim.cli.work.free_recovery"),
        ("cpsca", "attrim.cli.work.free_recovery"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(call, trained, tmp_path, monkeypatch, method, where):
    command = ["prune", *trained, "--method", method, "--keep-macs", "0.5", "--option", "epochs=2", "--device", "cpu"]
    command += ["--finetune-epochs", "1"]
    whole = call(*command, "--out", tmp_path / "whole")
    assert whole.status == 0, whole.err

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(where, killed)
        assert call(*command, "--out", tmp_path / "short").status == 130
    refused = call(*command, "--out", tmp_path / "short")
    assert refused.status == 2
    assert "--resume" in refused.err
    resumed = call(*command, "--resume", "--out", tmp_path / "short")
    assert resumed.status == 0, resumed.err
    assert f"going on with {method}" in resumed.err
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()
    steps = [[line["step"] for line in lines(tmp_path / run)] for run in ("whole", "short")]
    assert steps[1].count("cut") == steps[1].count("gates") == 1
    assert [s for s in steps[0] if s != "gate training"] == [
        s for s in steps[1] if s not in ("gate training", "failed")
    ]


def test_a_ratio_of_channels_as_in_the_paper(call, trained, tmp_path):
    said = call(
        *("prune", *trained, "--method", "pcas", "--option", "ratio=0.25", "--option", "epochs=1", "--device", "cpu"),
        *("--recover", "none", "--out", tmp_path / "run"),
    )
    assert said.status == 0, said.err
    cut = next(line for line in lines(tmp_path / "run") if line["step"] == "cut")
    assert cut["channels"] == [16, 12]


def test_rounds_of_pcas(call, trained, tmp_path):
    said = call(
        *("prune", *trained, "--method", "pcas", "--keep-channels", "0.5", "--rounds", "2", "--option", "epochs=1"),
        *("--device", "cpu", "--out", tmp_path / "run"),
    )
    assert said.status == 0, said.err
    assert "round 2 of 2" in said.err
    assert next(line for line in lines(tmp_path / "run") if line["step"] == "cut")["channels"] == [16, 8]


def test_methods_are_listed_with_their_options(call):
    said = call("methods")
    assert said.status == 0
    assert "Yamamoto" in said.out
    assert "pcas: ratio=null, policy=internal, act=double" in said.out


def test_wrong_use_is_one_paragraph(call, net, trained, tmp_path):
    bare = call("prune", net, "--input", "1x3x8x8", "--method", "pcas", "--keep-macs", "0.5", "--out", tmp_path / "a")
    assert bare.status == 2
    assert "Add --data PATH" in bare.err
    wrong = call(
        "prune", *trained, "--method", "pcas", "--keep-macs", "0.5", "--option", "epoch=2", "--out", tmp_path / "b"
    )
    assert wrong.status == 2
    assert "has no option 'epoch'" in wrong.err
    assert "Traceback" not in wrong.err


RESIDUAL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=2)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))
"""


def test_pcas_selects_inputs_from_the_command_line(call, images, tmp_path):
    (tmp_path / "residual.py").write_text(RESIDUAL)
    net, out = f"{tmp_path / 'residual.py'}:Net", tmp_path / "run"
    said = call(
        *("prune", net, "--input", "1x3x8x8", "--data", images, "--batch-size", "16", "--method", "pcas", "--out", out),
        *(
            "--keep-macs",
            "0.8",
            "--frozen",
            "inner.weight:0",
            "--option",
            "policy=input_select",
            "--option",
            "epochs=1",
        ),
    )
    assert said.status == 0, said.err
    plan = attrim.PruningPlan.load(out / "plan.json")
    assert "inner" in plan.selects
    small = attrim.load(out, model=build(net).model)
    assert small.stem.out_channels == small.outer.out_channels == 8
    assert small.inner.in_channels == len(plan.selects["inner"].keep) < 8
