"""The example network is the one of the paper: parameters, MACs and the names that its checkpoints use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attrim
from attrim.cli.models import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar_resnet.py"


@pytest.mark.parametrize(
    ("name", "params", "macs", "tensors"),
    [("resnet20", 269_722, 40_551_040, 116), ("resnet56", 853_018, 125_485_696, 332)],
)
def test_cifar_resnets(name, params, macs, tensors):
    model = build(f"{EXAMPLE}:{name}").model
    channels = attrim.trace(model, torch.zeros(1, 3, 32, 32))
    assert channels.cost.params() == params == sum(p.numel() for p in model.parameters())
    assert channels.cost.macs() == macs
    names = set(model.state_dict())
    assert len(names) == tensors
    assert {"conv1.weight", "bn1.running_var", "layer3.2.conv2.weight", "layer2.0.bn2.bias", "linear.bias"} <= names
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
