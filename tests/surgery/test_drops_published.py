"""Published networks lose every branch, or every other one with random channels, and the proof holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import attrim

slow = pytest.mark.slow
NETWORKS = [
    pytest.param("torchvision:resnet18", 64, 8, 0),
    pytest.param("torchvision:resnet50", 64, 16, 0, marks=slow),
    pytest.param("torchvision:mobilenet_v2", 64, 10, 0, marks=slow),
    pytest.param("torchvision:convnext_tiny", 64, 18, 0, marks=slow),
    pytest.param("torchvision:vit_b_16", 224, 24, 12, marks=slow),
    pytest.param("timm:resnetv2_50", 64, 16, 0, marks=slow),
    pytest.param("timm:repvgg_a0", 64, 39, 0, marks=slow),
    pytest.param("timm:vit_tiny_patch16_224", 224, 24, 12, marks=slow),
    pytest.param("timm:poolformer_s12", 64, 24, 12, marks=slow),
    pytest.param("timm:hrnet_w18_small", 64, 26, 0, marks=slow),
]


def build(name: str) -> nn.Module:
    library, _, network = name.partition(":")
    package = pytest.importorskip(library)
    torch.manual_seed(0)
    model: nn.Module = getattr(package.models, network)() if library == "torchvision" else package.create_model(network)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(("name", "size", "branches", "passes"), NETWORKS)
def test_every_branch_goes(name: str, size: int, branches: int, passes: int) -> None:
    model, x = build(name), torch.randn(1, 3, size, size)
    channels = attrim.trace(model, x)
    assert (len(channels.branches), len(channels.passes)) == (branches, passes)
    assert all(b.gate for b in channels.branches)
    ids = [b.id for b in channels.branches]
    rng = np.random.default_rng(0)
    kept = {g.id: np.sort(rng.permutation(g.size)[: max(1, g.size // 2)]) for g in channels}
    for drops, choice in ((ids, {}), (ids[::2], kept)):
        plan = attrim.plan_from_kept(channels, choice, drops=drops)
        small = attrim.apply(model, plan)
        check = attrim.verify(model, small, plan, x)
        assert check.ok, str(check)
        assert sum(p.numel() for p in small.parameters()) == plan.provenance["params_after"]
        assert attrim.trace(small, x).cost.macs() == plan.provenance["macs_after"]
