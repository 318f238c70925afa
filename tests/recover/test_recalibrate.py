"""Recalibrated statistics are the population's, and nothing else moves."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attrim.errors import AttrimWarning, DataError, InputError
from attrim.recover import recalibrate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.bn = nn.BatchNorm2d(3, momentum=0.3)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(3, 2)
        self.bn2 = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.head(self.drop(self.bn(self.conv(x))).mean((2, 3))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    net = Net()
    net.bn.running_mean.fill_(9)
    net.bn.num_batches_tracked.fill_(5)
    return net


def batches(*sizes: int) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(n, 2, 4, 4) * (i + 1) + i for i, n in enumerate(sizes)]


def population(net: Net, data: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Average over batches of the mean and the unbiased variance of the convolution's output, in numpy."""
    weight, bias = net.conv.weight.detach().numpy()[:, :, 0, 0], net.conv.bias.detach().numpy()
    outputs = [np.einsum("oc,nchw->onhw", weight, x.numpy()).reshape(3, -1) + bias[:, None] for x in data]
    return np.mean([y.mean(1) for y in outputs], 0), np.mean([y.var(1, ddof=1) for y in outputs], 0)


def test_statistics_equal_the_population(net):
    data = batches(8, 8, 8)
    fresh = recalibrate(net, data)
    mean, var = population(net, data)
    np.testing.assert_allclose(fresh.bn.running_mean.numpy(), mean, atol=1e-5)
    np.testing.assert_allclose(fresh.bn.running_var.numpy(), var, rtol=1e-5)
    assert fresh.bn.num_batches_tracked == 3


def test_the_argument_is_untouched_and_modes_are_kept(net):
    net.eval()
    net.bn.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fresh = recalibrate(net, batches(8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.bn.momentum == 0.3
    assert fresh.bn.momentum == 0.3
    assert fresh.bn2.momentum == 0.1
    assert [m.training for m in fresh.modules()] == [m.training for m in net.modules()]
    for name in ("conv.weight", "bn.weight", "bn.bias", "head.weight"):
        assert torch.equal(fresh.state_dict()[name], before[name])
    assert all(p.grad is None and p.requires_grad for p in fresh.parameters())


def test_dropout_stays_off(net):
    """With dropout at 0.9 on, the second norm would see other inputs in each run."""
    data = batches(8, 8)
    assert torch.equal(recalibrate(net, data).bn2.running_var, recalibrate(net, data).bn2.running_var)


def test_a_short_last_batch_is_left_out_when_there_are_others(net):
    data = batches(8, 8, 3)
    mean, _ = population(net, data[:2])
    np.testing.assert_allclose(recalibrate(net, data).bn.running_mean.numpy(), mean, atol=1e-5)
    alone, _ = population(net, data[2:])
    np.testing.assert_allclose(recalibrate(net, data[2:]).bn.running_mean.numpy(), alone, atol=1e-5)


def test_limit_reads_no_further(net):
    data = batches(8, 8, 8, 8)
    read = []

    def stream():
        for i, batch in enumerate(data):
            read.append(i)
            yield batch, torch.zeros(len(batch), dtype=torch.long)

    mean, _ = population(net, data[:2])
    np.testing.assert_allclose(recalibrate(net, stream(), limit=2).bn.running_mean.numpy(), mean, atol=1e-5)
    assert read == [0, 1]


def test_only_norms_with_statistics_are_measured():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    assert recalibrate(model, batches(4))[2].num_batches_tracked == 1


def test_without_batch_norm_it_is_an_unchanged_copy_and_says_so():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.GroupNorm(1, 3))
    with pytest.warns(AttrimWarning, match="Sequential has no batch norm with running statistics"):
        fresh = recalibrate(model, batches(4))
    assert fresh is not model
    assert torch.equal(fresh[0].weight, model[0].weight)


def test_bad_batches(net):
    with pytest.raises(DataError, match="recalibration read no batch: the source is empty"):
        recalibrate(net, [])
    with pytest.raises(DataError, match=r"found a batch of 1 sample\(s\)"):
        recalibrate(net, batches(1))
    with pytest.raises(DataError, match="not finite at 'bn'"):
        recalibrate(net, [torch.full((4, 2, 4, 4), float("nan"))])
    with pytest.raises(InputError, match="limit: expected the number of batches to read"):
        recalibrate(net, batches(4), limit=0)


def test_no_warning_in_the_usual_case(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate(net, batches(4, 4))
