"""``attrim prune --method dcpa``: every option in the run's file, and a run that goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from attrim.methods.table import METHODS

NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()

class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))
"""


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training and ten test images of 8 x 8, dark and light."""
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    folder = tmp_path / "images"
    folder.mkdir()
    for split, count in (("train", 40), ("test", 10)):
        pictures = []
        for i in range(count):
            file = io.BytesIO()
            pixels = random.integers(0, 120, (8, 8, 3)) + 130 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            pictures.append({"bytes": file.getvalue(), "path": None})
        labels = [i % 2 for i in range(count)]
        datasets.Dataset.from_dict({"img": pictures, "label": labels}, features=features).to_parquet(
            str(folder / f"{split}.parquet")
        )
    return folder


def test_a_run_writes_every_option_and_what_it_found(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attrim.cli.app import run

    (tmp_path / "net.py").write_text(NET)
    out = tmp_path / "run"
    call: list[Any] = [
        "prune", f"{tmp_path / 'net.py'}:Net", "--input", "1x3x8x8", "--data", images, "--keep-macs", "0.6", "--method", "dcpa",
        "--option", "epochs=2", "--option", "candidates=[0.5, 1.0]", "--option", "kind=xattn", "--batch-size", "8",
        "--out", out, "--device", "cpu",
    ]  # fmt: skip
    status = run([str(a) for a in call])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "verified: ok" in said.err
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert set(config["option"]) == set(METHODS["dcpa"].options)
    assert config["option"]["candidates"] == [0.5, 1.0]
    assert config["option"]["kind"] == "xattn"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    searched = [line for line in lines if line["step"] == "search"]
    assert [line["epoch"] for line in searched] == [1, 2]
    assert searched[-1]["target"]["macs"] == pytest.approx(0.6, abs=0.01)
    derived = next(line for line in lines if line["step"] == "derived")
    plan = json.loads((out / "plan.json").read_text())
    assert plan["provenance"]["branches"] == derived["drops"]
    assert run([str(a) for a in (*call, "--resume")]) == 0


def test_a_run_that_goes_on_writes_every_step_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import attrim.cli.work as work
    from attrim.cli.app import run
    from attrim.errors import DataError

    (tmp_path / "net.py").write_text(NET)
    out = tmp_path / "run"
    call = [
        "prune", f"{tmp_path / 'net.py'}:Net", "--input", "1x3x8x8", "--data", str(images), "--keep-macs", "0.6", "--method",
        "dcpa", "--option", "epochs=2", "--option", "candidates=[0.5, 1.0]", "--batch-size", "8", "--out", str(out),
        "--device", "cpu",
    ]  # fmt: skip

    def full(*given: Any) -> None:
        raise DataError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(work, "save_main", full)
        assert run(call) != 0
    before = steps_of(out)
    assert before.count("search") == 2
    assert before[-1] == "failed"
    assert run([*call, "--resume"]) == 0
    after = steps_of(out)
    for step, times in {
        "start": 1,
        "dense": 1,
        "search space": 1,
        "search": 2,
        "derived": 1,
        "cut": 1,
        "failed": 0,
    }.items():
        assert after.count(step) == times, step
    searched = [line for line in lines_of(out) if line["step"] == "search"]
    assert [line["epoch"] for line in searched] == [1, 2]
    (space,) = (line for line in lines_of(out) if line["step"] == "search space")
    assert space["candidates"] == {f"blocks.{i}": ["drop", "50 %", "100 %"] for i in range(2)}
    assert {u: len(p) for u, p in searched[0]["probabilities"].items()} == dict.fromkeys(space["candidates"], 3)


def test_a_network_that_lost_a_block_is_recovered_and_fine_tuned(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attrim.cli.app import run

    (tmp_path / "net.py").write_text(NET)
    out, more = tmp_path / "run", tmp_path / "more"
    status = run([
        "prune", f"{tmp_path / 'net.py'}:Net", "--input", "1x3x8x8", "--data", str(images), "--keep-macs", "0.6", "--method",
        "dcpa", "--option", "epochs=2", "--option", "candidates=[1.0]", "--option", "fine=false", "--batch-size", "8",
        "--recover", "free", "--finetune-epochs", "1", "--out", str(out), "--device", "cpu",
    ])  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["drops"]) == 1
    steps = steps_of(out)
    assert {"derived", "cut", "recovered", "finetune", "final"} <= set(steps)
    (check,) = (line["check"] for line in lines_of(out) if line["step"] == "derived")
    assert check["dropped"] == plan["provenance"]["branches"]
    assert "the narrowest network" in check["compared"][1]["refused"]  # the budget needs a drop here
    judged = [row for row in check["compared"] if "loss" in row]
    assert min(judged, key=lambda row: row["loss"])["drops"] == check["dropped"]
    assert all(0 <= row["accuracy"] <= 1 for row in judged)
    assert run(["finetune", str(out), "--epochs", "1", "--out", str(more), "--device", "cpu"]) == 0, (
        capsys.readouterr().err
    )
    assert json.loads((more / "plan.json").read_text())["drops"] == plan["drops"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[str]:
    return [line["step"] for line in lines_of(folder)]
