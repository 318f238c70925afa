"""`attrim trace`, `prune` and `evaluate` from end to end, on a small network and a few images."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import attrim
from attrim.cli.models import build
from attrim.recover import finetune, open_data
from attrim.ship import save_weights


@pytest.fixture
def trained(net, images, tmp_path) -> list[object]:
    """MODEL and options of a network that tells dark from light."""
    torch.manual_seed(0)
    data = open_data(str(images), shape=(3, 8, 8), batch_size=16)
    model = finetune(build(net).model, data.batches("train", shuffle=True), epochs=6, lr=0.05)
    save_weights(model, tmp_path / "w.safetensors")
    return [net, "--weights", tmp_path / "w.safetensors", "--input", "1x3x8x8"]


def steps(folder) -> dict[str, dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def test_trace_shows_groups_pins_and_costs(call, net):
    said = call("trace", net, "--input", "2x3x8x8")
    assert said.status == 0
    assert "2 groups, 16 channels that can go" in said.out
    assert [line.split() for line in said.out.splitlines()[4:6]] == [
        ["conv1", "8", "7", "yes"],
        ["conv2", "8", "7", "yes"],
    ]
    assert "head.weight:0" in said.out
    assert "is an output of the network" in said.out
    macs = 2 * (8 * 3 * 9 * 64 + 8 * 8 * 9 * 64 + 8 * 2)
    assert f"{macs:,} MACs for an input of 2x3x8x8, 858 parameters" in said.out


RESIDUAL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.pool = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(3, 1, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv(x)
        return self.head((x + self.pool(x)).mean((2, 3)))
"""


def test_trace_shows_branches_that_can_go_and_why_others_cannot(call, net, tmp_path):
    (tmp_path / "residual.py").write_text(RESIDUAL)
    said = call("trace", f"{tmp_path / 'residual.py'}:Net", "--input", "1x3x8x8")
    assert said.status == 0
    assert "1 residual branch that can be dropped whole" in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["conv", "36.86", "k", "96.0%", "yes", "the", "input"] in rows
    assert "1 sum of which no side can be dropped" in said.out
    assert "no parameter lies" in said.out
    assert "dropped" not in call("trace", net, "--input", "1x3x8x8").out


def test_trace_explains_a_tensor(call, net):
    said = call("trace", net, "--input", "1x3x8x8", "--explain", "conv2.weight", "--explain", "bn1.bias:0")
    assert said.status == 0
    assert "conv2.weight (8, 8, 3, 3)" in said.out
    assert "dim 0 (8): group 'conv2', 8 channels as out" in said.out
    assert "dim 1 (8): group 'conv1', 8 channels as in" in said.out
    assert "bn1.bias (8,)" in said.out
    said = call("trace", net, "--input", "1x3x8x8", "--explain", "conv9.weight")
    assert said.status == 2
    assert "no parameter or buffer is named 'conv9.weight'. Did you mean conv" in said.err


def test_prune_without_data(call, net, tmp_path):
    said = call("prune", net, "--input", "1x3x8x8", "--keep-macs", "0.5", "--out", tmp_path / "run", "--device", "cpu")
    assert said.status == 0
    assert "the weights are random" in said.err
    assert "verified: ok, exact" in said.err
    assert "MACs" in said.out
    assert "accuracy" not in said.out
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["architecture.svg", "config.yaml", "metrics.jsonl", "model.safetensors", "plan.json"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["model"], config["keep_macs"], config["input"], config["device"]) == (net, 0.5, "1x3x8x8", "cpu")
    found = steps(tmp_path / "run")
    before, after = found["cut"]["macs"]
    assert 0.4 < after / before <= 0.5
    assert found["cut"]["verified"] is True
    small = attrim.load(tmp_path / "run", model=build(net).model)
    assert sum(p.numel() for p in small.parameters()) == found["final"]["params"][1]


def test_prune_with_data_recovers_and_reports(call, trained, images, tmp_path):
    out = tmp_path / "run"
    said = call(
        *("prune", *trained, "--data", images, "--keep-macs", "0.5", "--method", "taylor", "--samples", "32"),
        *("--finetune-epochs", "2", "--batch-size", "16", "--out", out, "--device", "cpu"),
    )
    assert said.status == 0, said.err
    found = steps(out)
    assert list(found) == [
        "start",
        "dense",
        "cut",
        "reconstruct",
        "recalibrate",
        "recovered",
        "finetune",
        "finetuned",
        "final",
    ]
    assert found["dense"]["split"] == "holdout"
    assert found["final"]["split"] == "test"
    assert found["finetune"]["epoch"] == 2
    assert found["final"]["accuracy"][1] >= 0.9
    assert "accuracy on the test split" in said.out
    assert f"{found['final']['accuracy'][0]:.2%}" in said.out

    again = call("evaluate", trained[0], "--pruned", out, "--input", "1x3x8x8", "--data", images, "--device", "cpu")
    assert again.status == 0
    assert again.out == f"{found['final']['accuracy'][1]:.2%} top-1 on 20 images (test of {images})\n"


def test_the_same_seed_and_config_give_the_same_files(call, trained, images, tmp_path):
    options = [
        "--data",
        images,
        "--keep-macs",
        "0.5",
        "--finetune-epochs",
        "1",
        "--batch-size",
        "16",
        "--device",
        "cpu",
    ]
    assert call("prune", *trained, *options, "--out", tmp_path / "a").status == 0
    assert call("prune", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b").status == 0
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_evaluate_dense(call, trained, images):
    said = call("evaluate", *trained, "--data", images, "--split", "holdout", "--device", "cpu")
    assert said.status == 0
    assert said.out.endswith(f"top-1 on 6 images (holdout of {images})\n")
    assert "the weights are random" not in said.err
    said = call("evaluate", *trained, "--data", images, "--split", "middle")
    assert said.status == 2
    assert "--split: the data have train, holdout, test, not 'middle'." in said.err


def test_an_earlier_result_is_not_replaced_unasked(call, net, tmp_path):
    arguments = ["prune", net, "--input", "1x3x8x8", "--keep-macs", "0.5", "--out", tmp_path / "run"]
    assert call(*arguments).status == 0
    said = call(*arguments)
    assert said.status == 2
    assert "already holds a run (plan.json, model.safetensors). Choose another folder, or pass --overwrite." in said.err
    assert call(*arguments, "--overwrite").status == 0


def test_what_fails_later_is_written_down(call, net, tmp_path):
    arguments = ["prune", net, "--input", "1x3x8x8", "--out", tmp_path / "run"]
    said = call(*arguments, "--keep-macs", "0.01")
    assert said.status == 2
    assert said.err.splitlines()[-1].startswith("attrim: ")
    failed = steps(tmp_path / "run")["failed"]
    assert " ".join(str(failed["error"]).split()) in said.err
    assert call(*arguments, "--keep-macs", "0.5").status == 0  # no --overwrite needed: there was no result


def test_unknown_method_is_named(call, net, tmp_path):
    said = call("prune", net, "--input", "1x3x8x8", "--keep-macs", "0.5", "--method", "l3", "--out", tmp_path / "run")
    assert said.status == 2
    assert "unknown criterion 'l3'. Did you mean l" in said.err


def test_plan_of_another_model_is_refused(call, net, tmp_path):
    arguments = ["--input", "1x3x8x8", "--keep-macs", "0.5", "--out", tmp_path / "run"]
    assert call("prune", net, *arguments).status == 0
    plain = net.replace(":Net", ":plain")
    said = call("evaluate", plain, "--pruned", tmp_path / "run", "--input", "1x3x8x8", "--data", "nowhere.parquet")
    assert said.status == 1
    assert "the plan was made for another model: it cuts 'conv1.weight'" in said.err


def test_images_for_a_model_of_vectors(call, net, images, tmp_path):
    plain = net.replace(":Net", ":plain")
    said = call("prune", plain, "--input", "1x4", "--keep-macs", "0.5", "--data", images, "--out", tmp_path / "run")
    assert said.status == 2
    assert "--data holds images, but the model's input is 1x4." in said.err
    assert not (tmp_path / "run").exists()


def test_networks_without_batch_norm_are_refitted_and_not_recalibrated(call, tmp_path, images):
    (tmp_path / "ln.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),"
        " nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))"
    )
    said = call(
        *("prune", f"{tmp_path / 'ln.py'}:make", "--input", "1x3x8x8", "--keep-macs", "0.6", "--data", images),
        *("--out", tmp_path / "run", "--device", "cpu"),
    )
    assert said.status == 0
    assert list(steps(tmp_path / "run")) == ["start", "dense", "cut", "reconstruct", "recovered", "final"]


def test_rounds_cut_in_steps_and_end_in_one_plan(call, trained, images, tmp_path):
    out = tmp_path / "run"
    said = call(
        *("prune", *trained, "--data", images, "--keep-macs", "0.5", "--rounds", "2", "--batch-size", "16"),
        *("--out", out, "--device", "cpu"),
    )
    assert said.status == 0, said.err
    assert "round 1 of 2: " in said.err
    assert "round 2 of 2: " in said.err
    found = steps(out)
    assert list(found) == ["start", "dense", "cut", "reconstruct", "recalibrate", "recovered", "final"]
    assert 0.4 < found["final"]["macs"][1] / found["final"]["macs"][0] <= 0.5
    assert found["cut"]["verified"] is True
    assert not (out / "rounds").exists()
    refused = call("prune", *trained, "--keep-macs", "0.5", "--rounds", "0", "--out", tmp_path / "b")
    assert refused.status == 2
    assert "'rounds'" in refused.err


def test_randaugment_is_for_training_and_checked_at_the_door(call, trained, images, tmp_path):
    refused = call(
        *("prune", *trained, "--data", images, "--keep-macs", "0.5", "--randaugment", "loud", "--out", tmp_path / "a"),
    )
    assert refused.status == 2
    assert "loud" in refused.err
    assert not (tmp_path / "a").exists()
    said = call(
        *("prune", *trained, "--data", images, "--keep-macs", "0.5", "--randaugment", "rand-m3", "--device", "cpu"),
        *("--finetune-epochs", "1", "--batch-size", "16", "--out", tmp_path / "b"),
    )
    assert said.status == 0, said.err
    assert "randaugment: rand-m3" in (tmp_path / "b" / "config.yaml").read_text()
