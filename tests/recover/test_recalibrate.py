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
    """Mean and unbiased variance of the convolution's output over all images together, in numpy."""
    weight, bias = net.conv.weight.detach().numpy()[:, :, 0, 0], net.conv.bias.detach().numpy()
    outputs = [np.einsum("oc,nchw->onhw", weight, x.numpy()).reshape(3, -1) + bias[:, None] for x in data]
    together = np.concatenate(outputs, 1).astype(np.float64)
    return together.mean(1), together.var(1, ddof=1)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 3), (2, 9), (5,)])
def test_statistics_equal_the_population(net, sizes):
    data = batches(*sizes)
    fresh = recalibrate(net, data)
    mean, var = population(net, data)
    np.testing.assert_allclose(fresh.bn.running_mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(fresh.bn.running_var.numpy(), var, rtol=1e-6)
    assert fresh.bn.num_batches_tracked == len(sizes)


def test_the_variance_holds_the_spread_of_the_batches_means():
    """Two constant batches, -3 and 3, of 4 and 12 values: each has variance 0, together mean 1.5 and squares 108."""
    fresh = recalibrate(nn.Sequential(nn.BatchNorm1d(1)), [torch.full((4, 1), -3.0), torch.full((12, 1), 3.0)])
    assert fresh[0].running_mean.item() == 1.5
    assert fresh[0].running_var.item() == pytest.approx(108 / 15, rel=1e-6)


def test_values_far_from_zero_keep_their_variance():
    """In single precision the squares of 1e4 would drown a variance of 1."""
    data = [1e4 + torch.randn(64, 1, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    fresh = recalibrate(nn.Sequential(nn.BatchNorm1d(1)), data)
    assert fresh[0].running_var.item() == pytest.approx(torch.cat(data).double().var().item(), rel=1e-3)


class Twice(nn.Module):
    """One norm for two inputs, and a norm that runs on the second batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.rare, self.never, self.calls = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.rare(x)
        return self.bn(x) + self.bn(input=2 * x[:2] + 1).sum()


def test_each_call_of_a_shared_norm_counts():
    data = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in (4, 7, 5)]
    fresh = recalibrate(Twice(), data)
    together = torch.cat([part for x in data for part in (x, 2 * x[:2] + 1)]).double()
    torch.testing.assert_close(fresh.bn.running_mean.double(), together.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fresh.bn.running_var.double(), together.var(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(fresh.rare.running_var, data[1].var(0))
    assert [n.num_batches_tracked.item() for n in (fresh.bn, fresh.rare, fresh.never)] == [6, 1, 0]
    assert fresh.never.running_var.tolist() == [1, 1]


def test_norms_that_sum_over_gpus_are_measured_anywhere():
    data = batches(4, 3)
    plain = recalibrate(nn.Sequential(nn.BatchNorm2d(2)), data)[0]
    synced = recalibrate(nn.Sequential(nn.SyncBatchNorm(2)), data)[0]
    assert torch.equal(plain.running_var, synced.running_var)
    assert "forward" not in vars(synced)
    assert synced.momentum == 0.1


def test_double_precision_stays():
    fresh = recalibrate(nn.Sequential(nn.BatchNorm2d(2)).double(), [x.double() for x in batches(4, 3)])
    reference = torch.cat(batches(4, 3)).double()
    torch.testing.assert_close(fresh[0].running_var, reference.var((0, 2, 3)), rtol=1e-12, atol=0)


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


def test_a_last_batch_of_one_is_left_out_where_it_cannot_be_normalised(net):
    data = batches(8, 8, 1)
    fresh = recalibrate(net, data)
    mean, var = population(net, data[:2])
    np.testing.assert_allclose(fresh.bn.running_mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(fresh.bn.running_var.numpy(), var, rtol=1e-6)
    assert fresh.bn2.num_batches_tracked == 2


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
