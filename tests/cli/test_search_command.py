"""`attrim search`: a run's folder, resumed after a kill to the same result, taken part in, extended, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import attrim
from attrim.cli.models import build
from attrim.cli.search_progress import SearchProgress
from attrim.recover import finetune, open_data
from attrim.search.protocol import Trial
from attrim.ship import save_weights

pytest.importorskip("optuna")


NET = """
from torch import nn

def make():
    layers = []
    for cin in (3, 8, 8, 8):
        layers += [nn.Conv2d(cin, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
"""


@pytest.fixture
def net(tmp_path) -> str:
    """Four groups: many ways to keep a budget."""
    (tmp_path / "chain.py").write_text(NET)
    return f"{tmp_path / 'chain.py'}:make"


@pytest.fixture
def trained(net, images, tmp_path) -> list[object]:
    """MODEL, weights and data of a network that tells dark from light."""
    torch.manual_seed(0)
    data = open_data(str(images), shape=(3, 8, 8), batch_size=16)
    model = finetune(build(net).model, data.batches("train", shuffle=True), epochs=3, lr=0.05)
    save_weights(model, tmp_path / "w.safetensors")
    return [net, "--weights", tmp_path / "w.safetensors", "--input", "1x3x8x8", "--data", images, "--batch-size", "16"]


QUICK = ("--keep-macs", "0.4", "--criterion", "l2", "--device", "cpu", "--recover", "none", "--evaluations", "8")


def lines(folder, step=None) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if step in (None, line["step"])]


def timeless(entries) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "elapsed"} for entry in entries]


def test_a_search_from_the_command_line(call, trained, net, tmp_path) -> None:
    out = tmp_path / "run"
    said = call("search", *trained, *QUICK, "--recover", "free", "--finetune-epochs", "1", "--out", out)
    assert said.status == 0, said.err
    assert [line["step"] for line in lines(out)] == [
        "start", "dense", *["trial"] * 8, "searched", "cut", "reconstruct", "recalibrate", "recovered", "finetune",
        "finetuned", "final",
    ]  # fmt: skip
    trials = lines(out, "trial")
    assert [line["number"] for line in trials] == list(range(1, 9))
    assert trials[-1]["best"] == max(line["value"] for line in trials) == lines(out, "searched")[0]["value"]
    (cut,) = lines(out, "cut")
    assert cut["verified"] is True
    assert cut["macs"][1] <= 0.4 * cut["macs"][0]
    best = next(line for line in trials if line["value"] == trials[-1]["best"])
    plan = attrim.PruningPlan.load(out / "plan.json")
    assert [note["kept"] for note in plan.groups.values()] == best["kept"]
    small = attrim.load(out, model=build(net).model)
    assert sum(p.numel() for p in small.parameters()) == lines(out, "final")[0]["params"][1]
    assert "candidates; the first had" in said.err
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["criterion"], config["algorithm"], config["evaluations"]) == ("l2", "neighbourhood", 8)

    again = call("search", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.status == 0, again.err
    for name in ("plan.json", "model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_search_goes_on_and_is_extended(call, trained, tmp_path, monkeypatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert call("search", *trained, *QUICK, "--out", whole).status == 0
    seen = []

    def tick(self, done):
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchProgress, "tick", tick)
        assert call("search", *trained, *QUICK, "--out", out).status == 130
    refused = call("search", *trained, *QUICK, "--out", out)
    assert refused.status == 2
    assert "holds a run that was not finished. Pass --resume" in refused.err
    other = call("search", "--resume", "--out", out, "--seed", "3")
    assert other.status == 2
    assert "--seed 0; found --seed 3" in other.err
    said = call("search", "--resume", "--out", out)
    assert said.status == 0, said.err
    assert timeless(lines(out, "trial")) == timeless(lines(whole, "trial"))
    for name in ("plan.json", "model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()

    assert "is finished; --evaluations N searches on" in call("search", "--resume", "--out", out).out
    more = call("search", "--resume", "--out", out, "--evaluations", "12")
    assert more.status == 0, more.err
    assert len(lines(out, "trial")) == 12
    assert timeless(lines(out, "trial"))[:8] == timeless(lines(whole, "trial"))
    assert yaml.safe_load((out / "config.yaml").read_text())["evaluations"] == 12
    assert len(lines(out, "final")) == 1


def test_the_same_command_with_resume_takes_part(call, trained, tmp_path) -> None:
    shared = f"sqlite:///{tmp_path / 'trials.db'}"
    first, second = tmp_path / "a", tmp_path / "b"
    assert call("search", *trained, *QUICK, "--storage", shared, "--out", first).status == 0
    refused = call("search", *trained, *QUICK, "--storage", shared, "--out", second)
    assert refused.status == 1
    assert "holds this search already" in refused.err
    said = call("search", *trained, *QUICK, "--storage", shared, "--out", second, "--resume")
    assert said.status == 0, said.err
    assert timeless(lines(second, "trial")) == timeless(lines(first, "trial"))
    assert (first / "plan.json").read_bytes() == (second / "plan.json").read_bytes()
    assert lines(first, "searched")[0]["study"] == lines(second, "searched")[0]["study"]
    assert not (first / "method" / "trials.journal").exists()


@pytest.mark.slow
def test_two_workers_and_a_kill(call, trained, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = [*QUICK[:-1], "100", "--objective", "naive"]
    assert call("search", *trained, *settings, "--out", whole).status == 0
    command = [sys.executable, "-m", "attrim.cli.main", "search", *map(str, (*trained, *settings)), "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = out / "method" / "trials.journal"
    while process.poll() is None and (not journal.exists() or journal.read_text().count('"op_code":6') < 10):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "plan.json").exists()
    said = call("search", "--resume", "--out", out)
    assert said.status == 0, said.err
    assert timeless(lines(out, "trial")) == timeless(lines(whole, "trial"))
    assert (out / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


def test_a_password_is_written_nowhere(call, trained, tmp_path) -> None:
    out = tmp_path / "run"
    said = call("search", *trained, *QUICK, "--storage", "postgresql://me:secret@127.0.0.1:1/db", "--out", out)
    assert said.status != 0
    assert "secret" not in said.err
    for file in out.rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()
    assert yaml.safe_load((out / "config.yaml").read_text())["storage"] == "postgresql://me@127.0.0.1:1/db"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-macs", "0.5"), "Add --data PATH"),
        ((), "how small?"),
        (("--keep-macs", "0.5", "--workers", "0"), "'workers': input should be greater than or equal to 1"),
        (("--keep-macs", "0.5", "--objective", "slow"), "'objective': input should be 'fast' or 'naive'"),
    ],
)
def test_what_does_not_fit_is_said(call, net, tmp_path, options, message) -> None:
    said = call("search", net, "--input", "1x3x8x8", "--out", tmp_path / "run", *options)
    assert said.status == 2
    assert message in said.err
    assert not (tmp_path / "run").exists()


def test_settings_of_the_search_reach_it(call, trained, tmp_path) -> None:
    out = tmp_path / "run"
    said = call(
        "search",
        *trained,
        *QUICK,
        "--setting",
        "neighbours=2",
        "--start",
        "global",
        "--algorithm",
        "random",
        "--out",
        out,
    )
    assert said.status == 2
    assert "the search 'random' has none" in said.err
    said = call(
        "search", *trained, *QUICK, "--setting", "neighbours=3", "--option", "reduction=max", "--out", tmp_path / "b"
    )
    assert said.status == 0, said.err
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["setting"] == {"neighbours": 3}


def test_progress_says_best_pace_and_time_left(monkeypatch, capsys) -> None:
    now = [100.0]
    monkeypatch.setattr("attrim.cli.search_progress.time.monotonic", lambda: now[0])
    with SearchProgress(50) as progress:
        progress.tick(10)  # known from an earlier run
        assert progress.text() == ""
        progress.trial(Trial((1,), 0.75))
        now[0] += 30
        progress.tick(20)
        assert progress.text() == ", best 0.7500, 20.0 a minute, 2 min left"
        assert "20 of 50 candidates, best 0.7500, 20.0 a minute, 2 min left" in capsys.readouterr().err
        now[0] += 1
        progress.tick(21)
        assert capsys.readouterr().err == ""
        progress.tick(49)
        assert progress.text().endswith("75.5 a minute, 1 s left")
