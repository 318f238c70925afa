"""Criteria on traced networks: every group of a real map is scored, and pruning by the scores works."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import attrim
from attrim.score import CRITERIA


class Mixed(nn.Module):
    """A residual stream, a concat, a grouped and a depthwise convolution, a gate and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.down = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.grouped = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(12))
        self.gate = nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 12, 1))
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = x + self.down(self.depthwise(self.up(x)).relu())
        z = self.grouped(torch.cat([x, y], 1)).relu()
        z = z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        return self.head(nn.functional.adaptive_avg_pool2d(z, 2).flatten(1))


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, attrim.ChannelMap, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = Mixed().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    data = [(torch.randn(16, 3, 8, 8), torch.randint(0, 5, (16,))) for _ in range(3)]
    return model, attrim.trace(model, torch.zeros(1, 3, 8, 8)), data


@pytest.mark.filterwarnings("ignore::attrim.errors.AttrimWarning")
@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_group_is_scored_and_can_be_pruned(name, mixed) -> None:
    model, channels, data = mixed
    scores = attrim.score(model, channels, name, data)
    assert len(channels) >= 3
    assert {g.id: g.size for g in channels} == {group: len(v) for group, v in scores.values.items()}
    plan = attrim.allocate(channels, scores, attrim.Budget(macs=0.7))
    small = attrim.apply(model, plan)
    assert small(data[0][0]).shape == (16, 5)
    assert channels.cost.macs() > attrim.trace(small, torch.zeros(1, 3, 8, 8)).cost.macs()


@pytest.mark.parametrize("name", ["taylor", "obs"])
def test_the_score_says_what_removing_a_channel_costs(name, mixed) -> None:
    """Channels that are made useless where they are consumed score zero, whatever the map looks like."""
    model, channels, data = mixed
    for group in channels:
        consumers = group.with_role("in")
        weights = dict(model.named_parameters())
        before = {m.axis.tensor: weights[m.axis.tensor].detach().clone() for m in consumers}
        with torch.no_grad():
            for m in consumers:
                weights[m.axis.tensor].movedim(m.axis.dim, 0)[torch.from_numpy(m.index[0])] = 0
        try:
            value = attrim.score(model, channels, name, data, missing="skip").values[group.id]
        finally:
            with torch.no_grad():
                for tensor, old in before.items():
                    weights[tensor].copy_(old)
        assert consumers
        assert value[0] == 0
        assert value[1:].max() > 0


def test_taylor_is_the_gradient_of_a_gate_on_every_group(mixed) -> None:
    model, channels, data = mixed
    x, y = data[0]
    double = Mixed().double().eval()
    double.load_state_dict(model.state_dict())
    scores = attrim.score(double, channels, "taylor", [(x.double(), y)], power=1, normalize="none", joint="group")
    weights = dict(double.named_parameters())
    step = 1e-6
    for group in channels:
        losses = []
        for sign in (1, -1):
            changed = {}
            for m in group.with_role("in"):
                weight = changed.get(m.axis.tensor, weights[m.axis.tensor].detach().clone())
                weight.movedim(m.axis.dim, 0)[torch.from_numpy(m.index[0])] *= 1 + sign * step
                changed[m.axis.tensor] = weight
            with torch.no_grad():
                out = torch.func.functional_call(double, changed, (x.double(),))
            losses.append(float(nn.functional.cross_entropy(out, y)))
        slope = abs(losses[0] - losses[1]) / (2 * step)
        assert float(scores.values[group.id][0]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_attention_and_tokens_are_scored() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3))
    channels = attrim.trace(model, torch.zeros(2, 5, 6))
    data = [torch.randn(8, 5, 6) for _ in range(4)]
    assert len(channels)
    for name in [name for name in CRITERIA if name != "bn_scale"]:
        options = {"loss": lambda outputs, batch: outputs.square().mean()} if name == "taylor" else {}
        scores = attrim.score(model, channels, name, data, missing="skip", **options)
        assert scores.values
        assert all(float(v.max()) > 0 for v in scores.values.values())


@pytest.mark.slow
def test_scoring_a_resnet_50_takes_less_than_50_milliseconds() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50()
    channels = attrim.trace(model, torch.zeros(1, 3, 224, 224))
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        attrim.score(model, channels, "l2")
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.05
