"""Training a network without some of its residual branches, with the whole one as teacher."""

from __future__ import annotations

import pytest
import torch
from chains import pictures
from torch import Tensor, nn

import attrim
from attrim.errors import AttrimWarning
from attrim.recover import finetune, recalibrate
from attrim.recover.transfer import AttentionTransfer, choose_places
from nets import Residual, filled


class Inline(nn.Module):
    """Two branches written out in one module: no block shows the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        x = x + self.bn1(self.conv1(x.relu()))
        x = x + self.bn2(self.conv2(x.relu()))
        return self.head(x.mean((2, 3)))


def labelled(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(pictures(8, i), torch.randint(0, 10, (8,), generator=generator)) for i in range(count)]


@pytest.mark.parametrize(
    "drops", [["layers.1"], ["layers.5"], ["layers.2", "layers.3"], ["layers.0", "layers.1"]], ids=str
)
def test_attention_is_compared_at_what_both_networks_have(drops: list[str]) -> None:
    model = filled(Residual((8, 12, 16))).eval()
    data = labelled()
    channels = attrim.trace(model, data[0][0][:2])
    plan = attrim.plan_from_kept(channels, {"layers.4.conv1": range(9)}, drops=drops)
    small = attrim.apply(model, plan).eval()
    places = choose_places(channels, model, lambda net: net(data[0][0]), small)
    assert len(places) == 3
    transfer = AttentionTransfer(places)
    with transfer.watching(small, model), torch.no_grad():
        small(data[0][0]), model(data[0][0])
        assert float(transfer.loss()) >= 0
    taught = finetune(
        recalibrate(small, data), data, teacher=model, channels=channels, attention=10.0, distill=0.5, epochs=1, lr=0.01
    )
    assert taught.state_dict().keys() == small.state_dict().keys()
    assert all(bool(p.isfinite().all()) for p in taught.parameters())


def test_a_module_that_shows_nothing_but_zeros_is_no_place() -> None:
    model = filled(Inline()).eval()
    x = pictures(4)
    channels = attrim.trace(model, x[:2])
    whole = choose_places(channels, model, lambda net: net(x))
    assert [p.module for p in whole] == ["bn2"]
    branch = next(b.id for b in channels.branches if "bn2" in b.modules)
    small = attrim.apply(model, attrim.plan_from_kept(channels, {}, drops=[branch])).eval()
    left = choose_places(channels, model, lambda net: net(x), small)
    assert [p.module for p in left] == ["bn1"]
    modes = [m.training for m in small.modules()]
    assert not any(modes)


def test_a_group_that_vanished_is_left_out_and_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
            self.more, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.more(x + self.f(x)).relu().mean((2, 3)))

    model = filled(Bare()).eval()
    x = pictures(4)
    channels = attrim.trace(model, x[:2])
    small = attrim.apply(model, attrim.plan_from_kept(channels, {}, drops=[channels.branches[0].id])).eval()
    with pytest.warns(AttrimWarning, match="its branch was dropped"):
        places = choose_places(channels, model, lambda net: net(x), small)
    assert [p.group for p in places] == ["more"]
