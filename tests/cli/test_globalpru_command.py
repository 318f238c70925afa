"""`attrim prune --method globalpru`: every option in the run's file, resumed at each stage, rounds with the run's seed."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

import attrim
from attrim.cli.models import build
from attrim.methods.globalpru import history
from attrim.methods.table import METHODS
from attrim.recover import finetune, open_data
from attrim.ship import save_weights


@pytest.fixture
def command(net, images, tmp_path) -> list[object]:
    """The command line without its folder, for a network that tells dark from light."""
    torch.manual_seed(0)
    data = open_data(str(images), shape=(3, 8, 8), batch_size=16)
    model = finetune(build(net).model, data.batches("train", shuffle=True), epochs=4, lr=0.05)
    save_weights(model, tmp_path / "w.safetensors")
    return [
        *("prune", net, "--weights", tmp_path / "w.safetensors", "--input", "1x3x8x8", "--data", images),
        *("--batch-size", "16", "--method", "globalpru", "--keep-macs", "0.5", "--device", "cpu"),
        *("--option", "warmup_epochs=1", "--option", "epochs=2", "--option", "lr=0.1"),
    ]


def lines(folder) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_keeps_every_option_and_every_figure(call, command, net, tmp_path):
    out = tmp_path / "run"
    said = call(*command, "--finetune-epochs", "1", "--out", out)
    assert said.status == 0, said.err
    assert re.search(r"epoch 3 of the method's own training: loss [\d.]+, tau [\d.-]+, overlap [\d.]+", said.err)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["option"] == {**METHODS["globalpru"].options, "warmup_epochs": 1, "epochs": 2, "lr": 0.1}
    found = [line["step"] for line in lines(out)]
    assert found[:9] == ["start", "dense", *["gate training"] * 3, "gates", "vote", "agreement", "attention"]
    assert found[-3:] == ["finetune", "finetuned", "final"]
    diary = json.loads((out / "method" / "epochs.json").read_text())
    assert history(list(diary.values())).epochs == (1, 2, 3)
    vote = next(line for line in lines(out) if line["step"] == "vote")
    assert set(vote["agreement"]) == {"conv1", "conv2"}
    small = attrim.load(out, model=build(net).model)
    final = next(line for line in lines(out) if line["step"] == "final")
    assert sum(p.numel() for p in small.parameters()) == final["params"][1]
    again = call("prune", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.status == 0, again.err
    for name in ("plan.json", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    "where",
    [
        "attrim.methods.globalpru.ballots.read_attention",
        "attrim.methods.globalpru.run.TowardsOrder",
        "attrim.methods.gate_training.read_attention",
        "attrim.cli.work.free_recovery",
    ],
)
def test_a_killed_run_goes_on_to_the_same_result(call, command, tmp_path, monkeypatch, where):
    whole = call(*command, "--out", tmp_path / "whole")
    assert whole.status == 0, whole.err

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(where, killed)
        assert call(*command, "--out", tmp_path / "short").status == 130
    assert call(*command, "--out", tmp_path / "short").status == 2
    resumed = call(*command, "--resume", "--out", tmp_path / "short")
    assert resumed.status == 0, resumed.err
    assert "going on with globalpru" in resumed.err
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()
    steps = [[line["step"] for line in lines(tmp_path / run)] for run in ("whole", "short")]
    assert steps[0] == [step for step in steps[1] if step != "failed"]


def test_rounds_run_it_whole_with_the_seed_of_the_run(call, command, tmp_path):
    plans = {}
    for name, seed in (("one", "0"), ("other", "1")):
        out = tmp_path / name
        said = call(*command, "--option", "warmup_lr=0.3", "--rounds", "2", "--seed", seed, "--out", out)
        assert said.status == 0, said.err
        assert "round 2 of 2" in said.err
        plans[name] = (out / "model.safetensors").read_bytes()
    assert plans["one"] != plans["other"]
