"""Channels that others can stand in for are made good exactly; the ReLU and the shortcut behind are taken into account."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from chains import Chain, Packed, batches, calibrated, copies, cut, cut_pairs, pictures, quiet, same
from torch import Tensor, nn
from torch.nn import functional as F

import attrim
from attrim.errors import AttrimWarning, DataError, InputError, PlanError
from attrim.recover import recalibrate, reconstruct
from nets import Attention, Mobile, Plain, Residual, filled, image, kept_at_random

EXACT = {"ridges": (1e-12,), "rectify": False}


def gap(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    """Squared difference of the outputs, relative to the size of the second one's."""
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    return float((a - b).square().sum() / b.square().sum())


class Functional(nn.Module):
    """A convolution whose weight is a plain parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 6, 3, 3)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.first(x).relu(), self.weight, self.bias, padding=1)


class Flat(nn.Module):
    """A linear layer that reads nine pixels of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu().flatten(1))


class Tokens(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Einsum(Tokens):
    """A batched product over one matrix."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,oc->bno", self.first(x).relu(), self.last.weight) + self.last.bias


IMAGES = {
    "3x3": lambda: Chain(nn.Conv2d(6, 4, 3, padding=1)),
    "strided and dilated": lambda: Chain(nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 1), (2, 3))),
    "grouped": lambda: Chain(nn.Conv2d(6, 4, 3, groups=2)),
    "without bias": lambda: Chain(nn.Conv2d(6, 4, 3, bias=False)),
    "batch norm": lambda: Chain(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "two norms": lambda: Chain(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)),
    "depthwise between": lambda: Chain(
        nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    ),
    "functional": Functional,
    "flattened": Flat,
    "layer norm behind": lambda: Chain(nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4), nn.GELU()),
}
TOKENS = {
    "linear": lambda: Tokens(nn.Linear(6, 5)),
    "packed": lambda: Packed(False),
    "packed in parts": lambda: Packed(True),
    "einsum": Einsum,
}


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "alone"])
@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_channels_that_are_multiples_of_others_are_made_good_exactly(name, sequence):
    tokens = name in TOKENS
    net = copies({**IMAGES, **TOKENS}[name]())
    if name in ("grouped", "depthwise between"):  # what stands in has to be read by the same outputs
        net = grouped_copies(net, name)
    shape = (8, 5, 4) if tokens else (8, 3, 3, 3) if name == "flattened" else (8, 3, 9, 9)
    data = batches(*shape, count=20 if name == "flattened" else 4)
    kept = [0, 2] if name == "grouped" else [0, 1, 2]
    small, plan = cut(net, data[0], {"first.weight": kept})
    fitted = quiet(reconstruct, net, small, plan, data, sequence=sequence, **EXACT)
    x = torch.cat(batches(*shape, count=6)[5:])
    assert gap(small, net, x) > 1e-4
    assert gap(fitted, net, x) < 1e-10


@torch.no_grad()
def grouped_copies(net: Chain, name: str) -> Chain:
    """Multiples within each half for a grouped convolution; equal filters in depth for a depthwise one."""
    if name == "grouped":  # channel 1 goes from both halves
        net.first.weight[[1, 4]] = 2 * net.first.weight[[0, 3]]
        net.first.bias[[1, 4]] = 2 * net.first.bias[[0, 3]]
    else:
        depth, norm = net.last[0], net.last[1]
        net.first.weight[3:], net.first.bias[3:] = net.first.weight[:3], net.first.bias[:3]
        for tensor in (depth.weight, depth.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[3:] = tensor[:3]
    return net


@pytest.mark.parametrize("dims", [1, 3])
def test_in_other_dimensions_too(dims):
    kind = nn.Conv1d if dims == 1 else nn.Conv3d
    net = copies(Chain(kind(6, 4, 2, padding=1), dims=dims))
    shape = (8, 3, 20) if dims == 1 else (8, 3, 4, 5, 6)
    data = batches(*shape, count=4)
    small, plan = cut_pairs(net, data[0])
    fitted = quiet(reconstruct, net, small, plan, data, **EXACT)
    assert gap(fitted, net, batches(*shape, count=6)[5]) < 1e-10


def test_what_a_solver_says_behind_a_bias():
    """Channels that vary independently: the best fit on the same rows, bias included, by another route."""
    net = filled(Tokens(nn.Linear(6, 3)).double())
    data = batches(40, 1, 4, count=5)
    small, plan = cut(net, data[0], {"first.weight": [0, 1, 4]})
    fitted = quiet(reconstruct, net, small, plan, data, **EXACT)
    rows = torch.cat([small.first(x).relu() for x in data]).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(rows, torch.cat([net(x) for x in data]).flatten(0, 1)).solution
    torch.testing.assert_close(fitted.last.weight, solution[:-1].T, rtol=0, atol=1e-7)
    torch.testing.assert_close(fitted.last.bias, solution[-1], rtol=0, atol=1e-7)


def test_without_a_place_for_a_constant_the_fit_has_none():
    net = filled(Tokens(nn.Linear(6, 3, bias=False)).double())
    data = batches(40, 1, 4, count=5)
    small, plan = cut(net, data[0], {"first.weight": [0, 1, 4]})
    fitted = quiet(reconstruct, net, small, plan, data, **EXACT)
    rows = torch.cat([small.first(x).relu() for x in data]).flatten(0, 1)
    solution = torch.linalg.lstsq(rows, torch.cat([net(x) for x in data]).flatten(0, 1)).solution
    torch.testing.assert_close(fitted.last.weight, solution.T, rtol=0, atol=1e-7)
    assert set(fitted.state_dict()) == set(small.state_dict())


def test_recalibrating_with_the_same_data_changes_little():
    """The batch norm behind a fit has the statistics of its new input, at the fitted function."""
    net = filled(Chain(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)).double())
    data = batches(32, 3, 12, 12, count=4)
    small, plan = cut(net, data[0], {"first.weight": [0, 1, 4]})
    fitted = reconstruct(net, small, plan, data, samples=None)
    again = recalibrate(fitted, data)
    x = batches(32, 3, 12, 12, count=6)[5]
    assert gap(recalibrate(small, data), net, x) > 2 * gap(fitted, net, x)
    assert gap(again, fitted, x) < 1e-3
    values = torch.cat([fitted.last(fitted.act(fitted.first(x))) for x in data])
    torch.testing.assert_close(fitted.behind[0].running_mean, values.mean((0, 2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.behind[0].running_var, values.var((0, 2, 3)), rtol=1e-3, atol=0)


def test_targets_behind_a_relu_lower_the_error_there():
    """A single input cannot meet values below zero and above it; behind the ReLU only those above count."""
    net = filled(Chain(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double(), seed=2)
    with torch.no_grad():
        net.last.bias.sub_(1)
    data = batches(16, 3, 8, 8, count=6)
    small, plan = cut(net, data[0], {"first.weight": [0, 3]})
    x = batches(16, 3, 8, 8, count=8)[7]
    errors = []
    for rectify in (False, True):
        fitted = reconstruct(net, small, plan, data, rectify=rectify)
        with torch.no_grad():
            ours = fitted.behind[0](fitted.last(fitted.act(fitted.first(x))))
            theirs = net.behind[0](net.last(net.act(net.first(x))))
        errors.append(float((ours - theirs).square().mean()))
    assert errors[1] < 0.97 * errors[0]


class Branched(nn.Module):
    """Behind the sum of two branches; ``late`` runs the shortcut after the block, as torchvision does."""

    def __init__(self, late: bool, rectified: bool = True) -> None:
        super().__init__()
        self.first, self.late, self.rectified = nn.Conv2d(3, 6, 1), late, rectified
        self.last, self.norm = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.down, self.down_norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = None if self.late else self.down_norm(self.down(x))
        y = self.norm(self.last(self.first(x).relu()))
        y += self.down_norm(self.down(x)) if shortcut is None else shortcut
        return y.relu_() if self.rectified else y


@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_the_shortcut_is_made_good_by_the_block(late):
    """The shortcut is off by a multiple of what the block reads."""
    net = filled(Branched(late, rectified=False).double())
    with torch.no_grad():
        net.first.weight[:3, :, 0, 0] = torch.eye(3)
        net.first.bias[:3] = 10  # the ReLU is open: the inputs themselves are read
    data = batches(8, 3, 6, 6)
    small, plan = cut(net, data[0], {"first.weight": [0, 1, 2]})
    with torch.no_grad():
        wrong = copy.deepcopy(net)
        wrong.down.weight.mul_(0.5)
        other = copy.deepcopy(small)
        other.down.weight.mul_(0.5)
    lasts = {"layers": "consumers", **EXACT}
    fitted = reconstruct(net, other, plan, data, **lasts)
    x = batches(8, 3, 6, 6, count=6)[5]
    linear = net.last.weight[:, 3:].abs().sum() > 0  # the removed channels are no linear function of the kept ones
    assert linear
    right = reconstruct(net, small, plan, data, **lasts)
    assert gap(fitted, net, x) == pytest.approx(gap(right, net, x), rel=1e-6)
    assert torch.equal(fitted.down.weight, other.down.weight)
    assert gap(other, net, x) > 2 * gap(fitted, net, x)


@pytest.mark.parametrize("late", [False, True])
def test_blocks_are_compared_behind_the_sum_wherever_the_shortcut_runs(late):
    net = copies(Branched(late))
    data = batches(8, 3, 6, 6)
    small, plan = cut_pairs(net, data[0])
    told = []
    fitted = reconstruct(net, small, plan, data, ridges=(1e-12,), on_layer=told.append)
    assert gap(fitted, net, batches(8, 3, 6, 6, count=6)[5]) < 1e-10
    assert "last.weight" in {r.tensor for r in told if r.ridge > 0}


class PreActivation(nn.Module):
    """Batch norm and ReLU before each convolution; the sum is read by the next block's batch norm and by its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 6, 8, 6, 8))
        self.first, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        norms = self.norms
        x = x + self.last(norms[1](self.first(norms[0](x).relu())).relu())
        x = x + self.fourth(norms[3](self.third(norms[2](x).relu())).relu())
        return self.head(norms[4](x).relu().mean((2, 3)))


def test_pre_activation_blocks():
    net = calibrated(PreActivation())
    data = [pictures(64, i) for i in range(4)]
    small, plan = cut(net, data[0], {"first.weight": [0, 1, 4], "third.weight": [2, 3, 4]})
    fitted = quiet(reconstruct, net, small, plan, data)
    x = pictures(64, 9)
    assert gap(fitted, net, x) < 0.5 * gap(recalibrate(small, data), net, x)


@pytest.mark.parametrize("kind", [Residual, Mobile])
def test_whole_networks_come_closer_to_the_dense_one(kind):
    net = calibrated(kind())
    data = [pictures(64, i) for i in range(4)]
    plan = kept_at_random(attrim.trace(net, data[0][:1]), seed=2, least=6)
    small = attrim.apply(net, plan)
    told = []
    fitted = quiet(reconstruct, net, small, plan, data, on_layer=told.append)
    x = pictures(64, 11)
    assert gap(fitted, net, x) < 0.8 * gap(recalibrate(small, data), net, x)
    assert gap(fitted, net, x) < 0.8 * gap(small, net, x)
    assert all(r.after < r.before for r in told if r.ridge > 0)
    assert sum(r.ridge > 0 for r in told) > len(told) / 2
    assert [r.tensor for r in told].index("fc.weight") == len(told) - 1


# what cannot be fitted


class Shared(nn.Module):
    """An embedding that is the head's weight as well, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(11, 4), nn.Linear(4, 6)
        self.last, self.head = nn.Linear(6, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.last(self.first(x).relu())
        return self.head(x + self.last(self.first(x).relu()))


def test_shared_weights_are_left_with_the_reason():
    net = filled(Shared())
    tokens = torch.arange(22).view(2, 11) % 11
    small, plan = cut(net, tokens, {"first.weight": [0, 2, 5]})
    told = []
    with pytest.warns(AttrimWarning, match=r"'last.weight': runs 2 times in a forward pass"):
        fitted = reconstruct(net, small, plan, [tokens], on_layer=told.append)
    assert same(fitted, small)
    assert told == []
    assert fitted.head.weight is fitted.embed.weight


def test_a_transposed_convolution_is_left_with_the_reason():
    net = copies(Chain(nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 3, 1)))
    small, plan = cut_pairs(net, image(dtype=torch.float64))
    with pytest.warns(AttrimWarning, match=r"'last.weight': a transposed convolution"):
        fitted = reconstruct(net, small, plan, batches(8, 3, 8, 8))
    assert torch.equal(fitted.last.weight, small.last.weight)
    assert not torch.equal(fitted.behind[1].weight, small.behind[1].weight)  # what follows makes up for some of it


# ways through the network


def pair_of_networks(kind=Residual):
    net = calibrated(Residual((8, 16, 32)) if kind is Residual else kind())
    data = [pictures(16, i) for i in range(4)]
    plan = kept_at_random(attrim.trace(net, data[0][:1]), seed=2, least=5)
    return net, attrim.apply(net, plan), plan, data


@pytest.mark.parametrize("kind", [Residual, Mobile])
def test_waiting_and_restarting_give_the_same_network(kind):
    net, small, plan, data = pair_of_networks(kind)
    net, small, data = net.double(), small.double(), [x.double() for x in data]
    waiting, restarting = ([], [])
    one = reconstruct(net, small, plan, data, on_layer=waiting.append)
    other = reconstruct(net, small, plan, data, memory=0, on_layer=restarting.append)
    assert [r.tensor for r in waiting] == [r.tensor for r in restarting]
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=1e-8, msg=name)


def test_the_same_seed_gives_the_same_network():
    net, small, plan, data = pair_of_networks()
    assert same(reconstruct(net, small, plan, data), reconstruct(net, small, plan, data))


def test_each_layer_alone_helps_less_than_in_sequence():
    net, small, plan, data = pair_of_networks()
    told = []
    alone = reconstruct(net, small, plan, data, sequence=False, on_layer=told.append)
    x = pictures(64, 11)
    assert gap(alone, net, x) < gap(small, net, x)
    assert gap(reconstruct(net, small, plan, data), net, x) < gap(alone, net, x)
    assert told[-1].tensor == "fc.weight"
    portions = reconstruct(net, small, plan, data, sequence=False, memory=0)
    assert gap(portions, alone, x) < 1e-6


def test_only_consumers():
    net, small, plan, data = pair_of_networks(Plain)
    told = []
    fitted = reconstruct(net, small, plan, data, layers="consumers", on_layer=told.append)
    assert [r.tensor for r in told] == ["conv2.weight", "head.weight"]
    assert torch.equal(fitted.conv1.weight, small.conv1.weight)


class Storing(Plain):
    """Keeps what it computed, and reads it again: passes in step would read each other's."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.kept = where, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        self.kept = {"tensor": y, "list": [y], "dict": {"y": (y,)}}[self.where]
        z = self.bn2(self.conv2(y)).relu()
        kept = {"tensor": lambda: self.kept, "list": lambda: self.kept[0], "dict": lambda: self.kept["y"][0]}[
            self.where
        ]()
        return self.head(z.mean((2, 3)) * (1 + kept.mean((1, 2, 3), keepdim=True).flatten(1)))


@pytest.mark.parametrize("where", ["tensor", "list", "dict"])
def test_modules_that_hold_activations_are_run_one_pass_at_a_time(where):
    net = calibrated(Storing(where)).double()
    data = batches(16, 3, 8, 8)
    small, plan = cut(net, data[0], {"conv1.weight": [0, 1, 4, 6]})
    small.kept = None
    fitted = reconstruct(net, small, plan, data)
    plain = reconstruct(net, small, plan, data, memory=0)
    assert same(fitted, plain)


class Deciding(Plain):
    """Takes another course for bright images."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        if x.mean() > 1:
            return self.head(F.conv2d(y, self.conv2.weight.flip(2), padding=1).mean((2, 3)))
        return self.head(self.bn2(self.conv2(y)).relu().mean((2, 3)))


def test_batches_on_different_courses_are_refused():
    net = calibrated(Deciding())
    small, plan = cut(net, image(), {"conv1.weight": [0, 1, 4, 6]})
    threads = threading.active_count()
    with pytest.raises(DataError, match=r"takes another course on different batches"):
        reconstruct(net, small, plan, [image(8, 3, 8, 8), image(8, 3, 8, 8) + 3])
    assert threading.active_count() == threads


@pytest.mark.parametrize("mode", [True, False])
def test_arguments_are_untouched(mode):
    net, small, plan, data = pair_of_networks()
    net.train(mode), small.train(mode), small.fc.train(not mode)
    seen = []
    handle = small.fc.register_forward_hook(lambda module, args, output: seen.append(module))
    before = copy.deepcopy(net.state_dict()), copy.deepcopy(small.state_dict()), [x.clone() for x in data]
    threads = threading.active_count()
    fitted = reconstruct(net, small, plan, data)
    for now, then in ((net.state_dict(), before[0]), (small.state_dict(), before[1])):
        assert all(torch.equal(now[name], then[name]) for name in then)
    assert all(torch.equal(a, b) for a, b in zip(data, before[2], strict=True))
    assert [m.training for m in fitted.modules()] == [m.training for m in small.modules()]
    assert all(m.training == mode for m in net.modules())
    assert small.fc not in seen
    assert all(p.grad is None for p in fitted.parameters())
    assert all(p.requires_grad for p in fitted.parameters())
    assert len(small.fc._forward_hooks) == 1
    handle.remove()
    assert threading.active_count() == threads


def test_attention_is_fitted_too():
    net = filled(Attention())
    data = [image(16, 7, 12, seed=i) for i in range(4)]
    plan = kept_at_random(attrim.trace(net, data[0]), seed=1, least=2)
    small = attrim.apply(net, plan)
    fitted = reconstruct(net, small, plan, data)
    x = image(64, 7, 12, seed=11)
    assert gap(fitted, net, x) < 0.7 * gap(small, net, x)


def test_errors_at_the_door():
    net, small, plan, data = pair_of_networks(Plain)
    with pytest.raises(PlanError, match=r"pruned: 'conv1.weight' should have shape"):
        reconstruct(net, net, plan, data)
    with pytest.raises(PlanError, match=r"fingerprints differ"):
        reconstruct(small, small, plan, data)
    with pytest.raises(InputError, match=r"dense: expected an nn.Module, found str"):
        reconstruct("net", small, plan, data)
    with pytest.raises(InputError, match=r"plan: expected an attrim.PruningPlan, found dict"):
        reconstruct(net, small, {}, data)
    with pytest.raises(DataError, match=r"reconstruction read no sample"):
        reconstruct(net, small, plan, iter(()))
    with pytest.raises(DataError, match=r"the model failed on a batch with inputs of shape \[\(2, 4, 8, 8\)\]"):
        reconstruct(net, small, plan, [torch.zeros(2, 4, 8, 8)])
    for name, value in (
        ("samples", 0),
        ("layers", "some"),
        ("memory", -1),
        ("widest", 0),
        ("ridges", ()),
        ("ridges", (-1.0,)),
    ):
        with pytest.raises(InputError, match=rf"{name}: expected"):
            reconstruct(net, small, plan, data, **{name: value})


class Added(Tokens):
    """The bias is added by an operator of its own, behind a change of layout; a batch norm may follow."""

    def __init__(self, norm: bool) -> None:
        super().__init__(nn.Linear(6, 3))
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = (self.first(x).relu() @ self.last.weight.T + self.last.bias).transpose(1, 2)
        return self.norm(y)


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_a_bias_that_is_added_afterwards_takes_the_constant(norm, sequence):
    """The best fit with a constant, by another route."""
    net = filled(Added(norm).double())
    data = batches(40, 7, 4, count=4)
    small, plan = cut(net, data[0], {"first.weight": [0, 1, 4]})
    fitted = quiet(reconstruct, net, small, plan, data, sequence=sequence, **EXACT)
    rows = torch.cat([small.first(x).relu() for x in data]).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    target = torch.cat([net(x).transpose(1, 2).flatten(0, 1) for x in data])
    best = rows @ torch.linalg.lstsq(rows, target).solution
    found = torch.cat([fitted(x).transpose(1, 2).flatten(0, 1) for x in data])
    torch.testing.assert_close(found, best, rtol=0, atol=1e-7)


def test_wide_layers_in_blocks_come_nearly_as_close():
    net, small, plan, data = pair_of_networks()
    x = pictures(64, 11)
    whole, blocks = (gap(reconstruct(net, small, plan, data, widest=widest), net, x) for widest in (4608, 60))
    assert whole < 0.8 * gap(small, net, x)
    assert abs(blocks - whole) < 0.15 * gap(small, net, x)


def test_inference_tensors_as_inputs():
    net, small, plan, data = pair_of_networks(Plain)
    with torch.inference_mode():
        frozen = [x.clone() for x in data]
        fitted = reconstruct(net, small, plan, frozen)
    assert same(fitted, reconstruct(net, small, plan, data))


def test_in_place_maps_between_the_contraction_and_the_comparison():
    class InPlace(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.act(self.first(x)))
            y.mul_(2.0).add_(1.0)
            return F.relu_(y)

    net = copies(InPlace(nn.Conv2d(6, 4, 1)))
    data = batches(8, 3, 9, 9)
    small, plan = cut_pairs(net, data[0])
    for memory in (0, 1 << 30):
        fitted = quiet(reconstruct, net, small, plan, data, memory=memory, ridges=(1e-12,))
        assert gap(fitted, net, batches(8, 3, 9, 9, count=6)[5]) < 1e-10
