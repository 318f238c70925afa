"""The demo, shortened: every step, the same result for the same seed, the table at the end."""

from __future__ import annotations

import json

import pytest
import torch

import attrim
from attrim.cli.demo import load_digits
from attrim.cli.demo_net import DigitNet

pytest.importorskip("sklearn")


def test_digits_are_split_once_and_for_all():
    digits = load_digits()
    assert [len(labels) for _, labels in (digits.train, digits.holdout, digits.test)] == [1257, 180, 360]
    assert digits.test[1][:8].tolist() == load_digits().test[1][:8].tolist()
    rows = torch.cat([images.flatten(1) for images, _ in (digits.train, digits.holdout, digits.test)])
    assert len(rows.unique(dim=0)) == 1797  # no picture twice, none in two splits
    images, labels = next(iter(digits.batches("test")))
    assert images.shape == (64, 1, 16, 16)
    assert labels.bincount(minlength=10).min() > 0


def test_short_demo(call, tmp_path):
    said = call("demo", "--epochs", "1", "--finetune-epochs", "1", "--out", tmp_path / "a")
    assert said.status == 0, said.err
    assert "outputs equal bit by bit" in said.out
    for row in ("accuracy", "MACs", "parameters", "weights file", "latency"):
        assert f" {row}" in said.out
    assert "cut with l2" in said.err
    assert "ok, exact" in said.err
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [
        *("train", "dense", "cut", "recovered", "finetune", "finetuned", "final"),
    ]
    final = lines[-1]
    assert final["reloaded_equal"] is True
    assert final["threads"] == 1
    assert 0.49 < final["macs"][1] / final["macs"][0] <= 0.5
    assert final["accuracy"][1] > 0.4
    small = attrim.load(tmp_path / "a", model=DigitNet())
    assert sum(p.numel() for p in small.parameters()) == final["params"][1]

    assert call("demo", "--epochs", "1", "--finetune-epochs", "1", "--out", tmp_path / "b").status == 0
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise(call, tmp_path):
    assert call("demo", "--out", tmp_path).status == 0
    final = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["accuracy"][0] > 0.98
    assert final["accuracy"][1] > final["accuracy"][0] - 0.02
    assert final["latency_ms"][1] < final["latency_ms"][0]
    assert final["elapsed"] < 120


def test_unknown_method_is_refused_before_training(call, tmp_path):
    said = call("demo", "--method", "l3", "--out", tmp_path / "a")
    assert said.status == 2
    assert "--method: expected one of random, l1, l2, lamp" in said.err
    assert not (tmp_path / "a").exists()


def test_bad_budget_is_refused_before_training(call, tmp_path):
    said = call("demo", "--keep-macs", "1.5", "--out", tmp_path / "a")
    assert said.status == 2
    assert "macs: expected the fraction that is kept, in (0, 1], found 1.5" in said.err
    assert not (tmp_path / "a").exists()


def test_without_the_extra(call, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    said = call("demo", "--out", tmp_path / "a")
    assert said.status == 2
    assert said.err == (
        "attrim: the demo needs the package 'scikit-learn', which is not installed. "
        "Install it with: pip install 'attrim[demo]'\n"
    )
