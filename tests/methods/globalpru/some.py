"""What the tests of GlobalPru share: noise, digits, gates that say something."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.methods.globalpru import globalpru
from attrim.methods.outcome import MethodOutcome
from attrim.modules.gates import Gates
from nets import Plain, filled

SIZES = (6, 6, 3)


def batches(classes: int = 5, seed: int = 0, side: int = 8, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Three batches of noise, the last one short."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 3, side, side, generator=generator).to(dtype),
            torch.randint(0, classes, (n,), generator=generator),
        )
        for n in SIZES
    ]


def spoken(gates: Gates, scale: float = 1.0, seed: int = 0) -> Gates:
    """The gates with random weights, so that attention differs from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(scale * noise / max(1, parameter.shape[-1]) ** 0.5)
    return gates


def setting(
    network: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, attrim.ChannelMap, Gates, list[Any]]:
    """A network, its map, gates with random weights, data."""
    model = filled(network or Plain()).to(dtype)
    data = batches(dtype=dtype)
    channels = attrim.trace(model, data[0][0])
    return model, channels, spoken(Gates(model, channels, example=data[0], **options), 3.0), data


@cache
def digits() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Handwritten digits 0 to 4 as three equal channels: 600 to train on, 301 to judge."""
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    labels = torch.tensor(raw.target)
    images, labels = images[labels < 5], labels[labels < 5]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (
        list(zip(images[:600].split(50), labels[:600].split(50), strict=True)),
        list(zip(images[600:].split(100), labels[600:].split(100), strict=True)),
    )


@cache
def on_digits(**options: Any) -> MethodOutcome:
    """The whole method from an untrained network, in about two seconds; made once for the same options."""
    train, holdout = digits()
    torch.manual_seed(0)
    model = Plain(16, 24).eval()
    given: dict[str, Any] = {
        "ratio": 0.5,
        "warmup_epochs": 6,
        "warmup_lr": 0.3,
        "epochs": 8,
        "lr": 0.1,
        "strength": 5.0,
        **options,
    }
    return globalpru(model, attrim.trace(model, train[0][0][:2]), train, holdout=holdout, **given)
