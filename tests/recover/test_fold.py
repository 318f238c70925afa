"""A removed channel that is constant is folded exactly; means are those of the data, or of the batch norm before."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from chains import Chain, Packed, batches, cut, quiet, same
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from attrim.errors import AttrimWarning, DataError, InputError, PlanError
from attrim.recover import fold_bias
from nets import Attention, Mobile, Plain, Residual, filled, image, kept_at_random


def with_constants(net: Chain, gone: list[int]) -> Chain:
    """Channels ``gone`` of the first convolution are the same everywhere."""
    net = filled(net.double())
    with torch.no_grad():
        net.first.weight[gone] = 0
        net.first.bias[gone] = torch.tensor([0.7, 1.9, -0.4][: len(gone)], dtype=torch.float64)
    return net


LASTS = {
    "1x1": lambda: nn.Conv2d(6, 4, 1),
    "3x3": lambda: nn.Conv2d(6, 4, 3),
    "strided": lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), dilation=(1, 2)),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
}


@pytest.mark.parametrize("name", LASTS)
def test_a_constant_channel_is_folded_exactly(name):
    gone = [2, 5] if name == "grouped" else [1, 4, 5]
    net = with_constants(Chain(LASTS[name]()), gone)
    keep = [0, 1] if name == "grouped" else [0, 2, 3]  # a group of 3 with two positions each
    small, plan = cut(net, image(1, 3, 9, 9, dtype=torch.float64), {"first.weight": keep})
    data = batches(2, 3, 9, 9)
    folded = quiet(fold_bias, net, small, plan, data)
    x = image(4, 3, 9, 9, seed=9, dtype=torch.float64)
    assert (small(x) - net(x)).abs().max() > 1e-2
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 3])
def test_in_other_dimensions_too(dims):
    net = with_constants(Chain((nn.Conv1d, None, nn.Conv3d)[dims - 1](6, 4, 2), dims=dims), [0, 3])
    shape = (2, 3, *[4] * dims)
    small, plan = cut(net, image(*shape, dtype=torch.float64), {"first.weight": [1, 2, 4, 5]})
    folded = quiet(fold_bias, net, small, plan, batches(*shape))
    x = image(*shape, seed=9, dtype=torch.float64)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-9)


def test_without_a_bias_the_running_mean_takes_it():
    net = with_constants(Chain(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), [0, 3])
    small, plan = cut(net, image(1, 3, 9, 9, dtype=torch.float64), {"first.weight": [1, 2, 4, 5]})
    folded = quiet(fold_bias, net, small, plan, batches(2, 3, 9, 9))
    x = image(4, 3, 9, 9, seed=9, dtype=torch.float64)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-9)
    assert torch.equal(folded.last.weight, small.last.weight)
    assert not torch.equal(folded.behind[0].running_mean, small.behind[0].running_mean)
    assert torch.equal(folded.behind[0].running_var, small.behind[0].running_var)


def test_with_padding_the_mean_over_all_positions_is_right():
    """Interior and border differ by design; on the average over positions nothing is missing."""
    net = with_constants(Chain(nn.Conv2d(6, 4, 3, padding=1)), [0, 3])
    small, plan = cut(net, image(1, 3, 7, 7, dtype=torch.float64), {"first.weight": [1, 2, 4, 5]})
    folded = quiet(fold_bias, net, small, plan, batches(2, 3, 7, 7))
    x = image(4, 3, 7, 7, seed=9, dtype=torch.float64)
    torch.testing.assert_close(folded(x).mean((2, 3)), net(x).mean((2, 3)), rtol=0, atol=1e-9)
    missing = (folded(x) - net(x))[:, :, 1:-1, 1:-1]
    assert missing.abs().max() > 1e-3
    assert (missing - missing[:1, :, :1, :1]).abs().max() < 1e-9  # the same constant everywhere inside


def test_the_mean_of_changing_channels_is_taken_over_all_batches():
    net = filled(Chain(nn.Conv2d(6, 4, 3, padding=1, stride=2)).double())
    small, plan = cut(net, image(1, 3, 7, 7, dtype=torch.float64), {"first.weight": [1, 2, 4]})
    data = [*batches(2, 3, 7, 7), image(5, 3, 8, 6, seed=7, dtype=torch.float64)]  # another size as well
    folded = quiet(fold_bias, net, small, plan, data, samples=None)
    missing = [(net(x) - small(x)).transpose(0, 1).flatten(1) for x in data]
    torch.testing.assert_close(folded.last.bias - small.last.bias, torch.cat(missing, 1).mean(1), rtol=0, atol=1e-10)


def test_samples_end_the_stream():
    net = filled(Chain(nn.Conv2d(6, 4, 1)).double())
    small, plan = cut(net, image(1, 3, 4, 4, dtype=torch.float64), {"first.weight": [1, 2, 4]})
    data = batches(2, 3, 4, 4, count=5)
    folded = fold_bias(net, small, plan, iter(data), samples=3)
    assert same(folded, fold_bias(net, small, plan, data[:2]))
    assert not same(folded, fold_bias(net, small, plan, data))


class Flat(nn.Module):
    """A linear layer that reads every pixel of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Linear(6 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("free", [False, True])
def test_a_linear_layer_behind_a_flattening(free):
    net = filled(Flat().double())
    with torch.no_grad():
        net.conv.weight[[0, 4]] = 0
        net.norm.running_mean[[0, 4]] = net.conv.bias[[0, 4]]
        net.norm.running_var[[0, 4]] = 0
    x = image(4, 3, 3, 3, seed=9, dtype=torch.float64)
    small, plan = cut(net, x, {"conv.weight": [1, 2, 3, 5]})
    given = {"example_inputs": x[:1]} if free else {"batches": batches(2, 3, 3, 3)}
    folded = quiet(fold_bias, net, small, plan, **given)
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("parts", [False, True])
def test_packed_projections_and_matrices_with_inputs_first(parts):
    net = filled(Packed(parts).double())
    with torch.no_grad():
        net.first.weight[[1, 2]] = 0
    x = image(3, 5, 4, seed=9, dtype=torch.float64)
    small, plan = cut(net, x, {"first.weight": [0, 3, 4, 5]})
    folded = quiet(fold_bias, net, small, plan, batches(2, 5, 4))
    assert not torch.allclose(small(x), net(x))
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-9)


def test_an_inverted_residual_network_with_dead_channels():
    """Depthwise convolutions pass the constants on; only those that mix channels take them up."""
    net = filled(Mobile().double())
    gone = [3, 17, 40]
    with torch.no_grad():
        block = net.body[0]
        for norm in (block.expand[1], block.depth[1]):
            norm.weight[gone] = 0
            norm.bias[gone] = 0.8
    x = image(2, 3, 16, 16, dtype=torch.float64)
    keep = [c for c in range(64) if c not in gone]
    small, plan = cut(net, x, {"body.0.expand.0.weight": keep})
    for folded in (quiet(fold_bias, net, small, plan, [x]), quiet(fold_bias, net, small, plan, example_inputs=x)):
        torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-9)


# without data


class Normed(nn.Module):
    """Batch norm, some function, and a consumer."""

    def __init__(self, act) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.last, self.act = nn.Conv2d(6, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x))))


def free_means(act) -> tuple[Tensor, Tensor, Tensor]:
    """What folding took the means of the removed channels for; and their mean and deviation before ``act``."""
    net = filled(Normed(act).double(), seed=4)
    with torch.no_grad():
        net.last.weight.zero_()
        for row, column in enumerate((0, 2, 3, 5)):
            net.last.weight[row, column, 0, 0] = 1
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    folded = quiet(fold_bias, net, small, plan, example_inputs=image(1, 3, 4, 4, dtype=torch.float64))
    gone = [0, 2, 3, 5]
    var = net.norm.running_var[gone]
    deviation = net.norm.weight[gone].abs() * (var / (var + net.norm.eps)).sqrt()
    return folded.last.bias - small.last.bias, net.norm.bias[gone], deviation


def test_relu_has_the_mean_of_the_rectified_normal():
    found, mean, deviation = free_means(F.relu)
    ratio = mean / deviation
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    expected = deviation * density + mean * torch.special.ndtr(ratio)
    assert ((found - expected).abs() / deviation).max() < 2e-3


def test_the_identity_and_the_square_are_exact():
    found, mean, deviation = free_means(lambda y: y)
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)
    found, mean, deviation = free_means(torch.square)
    torch.testing.assert_close(found, mean.square() + deviation.square(), rtol=0, atol=1e-12)


class PerChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(6))
        self.scale = nn.Parameter(torch.zeros(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope) * self.scale


FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh gelu": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "in place": lambda y: F.relu_(y).mul_(2.0).add_(1.0),
    "written out": lambda y: y * torch.sigmoid(y) + 0.3 * y,
    "mish": F.mish,
    "silu in place": lambda y: F.silu(y, inplace=True),
    "hardswish in place": lambda y: F.hardswish(y, inplace=True),
    "reversed": lambda y: 1 - F.leaky_relu_(y),
    "through views": lambda y: (
        F.elu(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (y.shape[2], y.shape[3]))
    ),
    "concatenated": lambda y: F.silu(torch.cat([y[:, :2].relu(), y[:, 2:].sigmoid()], 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_elementwise_function(name):
    """Against a plain sum over a fine grid."""
    act = FUNCTIONS[name]
    found, mean, deviation = free_means(act)
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    weight = (-grid.square() / 2).exp()
    values = mean[:, None] + deviation[:, None] * grid
    if name == "concatenated":
        values = F.silu(torch.cat([values[:1].relu(), values[1:].sigmoid()]))
    elif name == "through views":
        values = F.elu(values)
    else:
        values = act(values.clone())
    expected = (values * weight).sum(1) / weight.sum()
    assert ((found - expected).abs() / deviation).max() < 4e-3


def test_a_function_with_a_parameter_for_each_channel():
    torch.manual_seed(0)
    act = PerChannel().double()
    nn.init.normal_(act.slope), nn.init.normal_(act.scale)
    net = filled(Normed(act).double(), seed=4)
    slope, scale = (act.slope.detach().clone(), act.scale.detach().flatten().clone())
    with torch.no_grad():
        net.last.weight[:] = 1
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    folded = quiet(fold_bias, net, small, plan, example_inputs=image(1, 3, 4, 4, dtype=torch.float64))
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    weight = (-grid.square() / 2).exp()
    var = net.norm.running_var
    y = net.norm.bias[:, None] + (net.norm.weight * (var / (var + net.norm.eps)).sqrt())[:, None] * grid
    y = torch.where(y > 0, y, slope[:, None] * y) * scale[:, None]
    expected = ((y * weight).sum(1) / weight.sum())[[0, 2, 3, 5]].sum()
    torch.testing.assert_close(folded.last.bias - small.last.bias, expected.expand(4), rtol=0, atol=5e-3)


def test_normal_inputs_are_met_with_and_without_data():
    """Where the batch norm's input really is normal, both ways agree."""
    torch.manual_seed(0)
    net = filled(Normed(F.relu), seed=2)
    data = [torch.randn(64, 3, 8, 8) for _ in range(8)]
    with torch.no_grad():
        net.norm.running_mean.zero_()
        net.norm.running_var.copy_(net.first.weight.square().sum((1, 2, 3)))
    small, plan = cut(net, data[0], {"first.weight": [1, 4]})
    measured = quiet(fold_bias, net, small, plan, data)
    free = quiet(fold_bias, net, small, plan, example_inputs=data[0][:1])
    torch.testing.assert_close(measured.last.bias, free.last.bias, rtol=0, atol=1e-2)


class Pooled(nn.Module):
    def __init__(self, pool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.pool, self.head = pool, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.norm(self.first(x)).relu()).flatten(1))


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(1), lambda y: F.avg_pool2d(y, y.shape[2:]), lambda y: y.mean((2, 3), keepdim=True)]
)
def test_averages_keep_the_mean(pool):
    net = filled(Pooled(pool).double(), seed=4)
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    folded = quiet(fold_bias, net, small, plan, example_inputs=image(1, 3, 4, 4, dtype=torch.float64))
    n = net.norm
    mean = n.bias + n.weight.abs() * torch.randn(
        400_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    expected = net.head.weight[:, [0, 2, 3, 5]] @ mean.relu().mean(0)[[0, 2, 3, 5]]
    torch.testing.assert_close(folded.head.bias - small.head.bias, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveMaxPool2d(1),
        lambda y: y.mean((2, 3)).sigmoid(),
        lambda y: y.roll(1, 2).mean((2, 3)),
        lambda y: y.norm(dim=(2, 3)),
    ],
    ids=["maximum", "function of a mean", "roll", "norm"],
)
def test_what_no_batch_norm_tells_is_reported_and_left(pool):
    net = filled(Pooled(pool).double(), seed=4)
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    with pytest.warns(AttrimWarning, match=r"'head.weight': its inputs are no elementwise function of a batch norm's"):
        folded = fold_bias(net, small, plan, example_inputs=image(1, 3, 4, 4, dtype=torch.float64))
    assert same(folded, small)


def test_a_changed_base_is_no_longer_known():
    """``relu_`` on a view changes the batch norm's output as well."""

    def act(y: Tensor) -> Tensor:
        y.transpose(1, 2).relu_()
        return y

    net = filled(Normed(act).double())
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    with pytest.warns(AttrimWarning, match=r"'last.weight': its inputs are no elementwise"):
        fold_bias(net, small, plan, example_inputs=image(1, 3, 4, 4, dtype=torch.float64))


def test_branches_of_different_batch_norms_are_not_taken_for_one():
    class Two(Normed):
        def __init__(self) -> None:
            super().__init__(None)
            self.second, self.other = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.norm(self.first(x)) + self.other(self.second(x))).relu())

    net = filled(Two().double())
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    with pytest.warns(AttrimWarning, match=r"'last.weight'.*pass batches to measure them"):
        fold_bias(net, small, plan, example_inputs=image(1, 3, 4, 4, dtype=torch.float64))


# the rest


def test_consumers_without_a_place_for_a_constant_are_named():
    net = filled(Chain(nn.Conv2d(6, 4, 1, bias=False), nn.ReLU()).double())
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    with pytest.warns(AttrimWarning, match=r"'last.weight': it has no bias of its own and no batch norm behind it"):
        folded = fold_bias(net, small, plan, batches(2, 3, 4, 4))
    assert same(folded, small)


def test_a_layer_that_runs_twice_is_named_and_left():
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.first(x))
            return self.last(y) + self.last(y.flip(2))

    net = filled(Twice(nn.Conv2d(6, 4, 1)).double())
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    with pytest.warns(AttrimWarning, match=r"'last.weight': runs 2 times"):
        assert same(fold_bias(net, small, plan, batches(2, 3, 4, 4)), small)


def test_a_transposed_convolution_is_named_and_left():
    net = filled(Chain(nn.ConvTranspose2d(6, 4, 2)).double())
    small, plan = cut(net, image(dtype=torch.float64), {"first.weight": [1, 4]})
    with pytest.warns(AttrimWarning, match=r"'last.weight': a transposed convolution"):
        assert same(fold_bias(net, small, plan, batches(2, 3, 4, 4)), small)


def test_folding_helps_a_network_whose_channels_vary():
    net = filled(Residual(widths=(8, 16)))
    data = [image(32, 3, 12, 12, seed=i) for i in range(4)]
    attrim_plan = kept_at_random(attrim.trace(net, data[0][:1]), seed=3, least=4)
    small = attrim.apply(net, attrim_plan)
    folded = quiet(fold_bias, net, small, attrim_plan, data)
    fresh = image(64, 3, 12, 12, seed=11)
    error = [float((m(fresh) - net(fresh)).detach().square().mean()) for m in (small, folded)]
    assert error[1] < 0.7 * error[0]


def test_attention_by_data():
    net = filled(Attention())
    x = image(8, 7, 12)
    plan = kept_at_random(attrim.trace(net, x), seed=1, least=2)
    small = attrim.apply(net, plan)
    folded = fold_bias(net, small, plan, [x])
    assert not same(folded, small)
    assert folded(x).isfinite().all()


def test_arguments_are_untouched():
    net = filled(Plain())
    net.train(), net.bn1.eval()
    plan = kept_at_random(attrim.trace(net, image()), seed=1)
    small = attrim.apply(net, plan)
    before = copy.deepcopy(net), copy.deepcopy(small)
    folded = fold_bias(net, small, plan, [image()])
    assert same(net, before[0])
    assert same(small, before[1])
    assert [m.training for m in net.modules()] == [m.training for m in before[0].modules()]
    assert [m.training for m in folded.modules()] == [m.training for m in small.modules()]
    assert type(folded) is Plain
    assert folded is not small


def test_inputs_by_keyword():
    net = filled(Plain())
    plan = kept_at_random(attrim.trace(net, {"x": image()}), seed=1)
    small = attrim.apply(net, plan)
    by_name = fold_bias(net, small, plan, example_inputs={"x": image()})
    assert same(by_name, fold_bias(net, small, plan, example_inputs=(image(),)))
    assert not same(by_name, small)


def test_errors_at_the_door():
    net = filled(Plain())
    plan = kept_at_random(attrim.trace(net, image()), seed=1)
    small = attrim.apply(net, plan)
    with pytest.raises(InputError, match=r"example_inputs \(only shapes matter\)"):
        fold_bias(net, small, plan)
    with pytest.raises(InputError, match=r"samples: expected an int >= 1"):
        fold_bias(net, small, plan, [image()], samples=0)
    with pytest.raises(DataError, match=r"folding read no sample"):
        fold_bias(net, small, plan, iter(()))
    with pytest.raises(PlanError, match=r"pruned: 'conv1.weight' should have shape"):
        fold_bias(net, net, plan, [image()])
    with pytest.raises(PlanError, match=r"fingerprints differ"):
        fold_bias(small, small, plan, [image()])
    with pytest.raises(InputError, match=r"expected a tensor, a tuple or a dict of tensors, found str"):
        fold_bias(net, small, plan, example_inputs="image")
    with pytest.raises(DataError, match=r"the model failed on a batch"):
        fold_bias(net, small, plan, [torch.zeros(1, 4, 8, 8)])


def test_in_inference_mode():
    net = filled(Plain())
    plan = kept_at_random(attrim.trace(net, image()), seed=1)
    small = attrim.apply(net, plan)
    with torch.inference_mode():
        folded = fold_bias(net, small, plan, [image()])
        free = fold_bias(net, small, plan, example_inputs=image())
    assert same(folded, fold_bias(net, small, plan, [image()]))
    assert same(free, fold_bias(net, small, plan, example_inputs=image()))
