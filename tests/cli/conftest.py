"""A network in a file, images in a parquet file, and the command line called as a function."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """Two convolutions with norms; tells light images from dark ones after little training."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))

def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def nothing():
    return 3

def broken():
    raise RuntimeError("no such file: weights.bin")

ready = plain()
number = 7
'''


@dataclass
class Said:
    status: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    from attrim.cli.app import run

    def call(*arguments: object) -> Said:
        status = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return call


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:Net"


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 60 training and 20 test images of 8 x 8, dark (class 0) and light (class 1)."""
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    folder = tmp_path / "images"
    folder.mkdir()
    for split, count in (("train", 60), ("test", 20)):
        labels = [i % 2 for i in range(count)]
        pictures = []
        for label in labels:
            file = io.BytesIO()
            pixels = random.integers(0, 120, (8, 8, 3)) + 130 * label
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            pictures.append({"bytes": file.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"img": pictures, "label": labels}, features=features)
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder
