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
