"""Traced networks that every file of this room allocates on."""

from __future__ import annotations

import pytest
from torch import nn

import attrim
from attrim import ChannelMap
from nets import Mobile, Plain, Residual, filled, image


@pytest.fixture(scope="session")
def residual() -> ChannelMap:
    """Four stages, as ResNet-18 has them; 12 groups, 720 channels."""
    return attrim.trace(filled(Residual((16, 32, 64, 128), 2)), image(1, 3, 16, 16))


@pytest.fixture(scope="session")
def mobile() -> ChannelMap:
    """Inverted bottlenecks; 9 groups, 656 channels."""
    return attrim.trace(filled(Mobile()), image(1, 3, 32, 32))


@pytest.fixture(scope="session")
def plain() -> ChannelMap:
    """Groups ``conv1`` (8) and ``conv2`` (12)."""
    return attrim.trace(filled(Plain()), image())


@pytest.fixture(scope="session")
def chain() -> ChannelMap:
    """Eight groups of eight channels and of one structure."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return attrim.trace(filled(nn.Sequential(*layers, nn.Linear(8, 3))), image(2, 8))
