"""The masked network is the derived one; nothing of it stays behind; dropping a block changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from made import Dense, Made, made
from torch import Tensor, nn

import attrim
from attrim.errors import InputError
from attrim.methods.dcpa.derive import repair
from attrim.methods.dcpa.sample import Draw
from attrim.methods.dcpa.stage2 import Fixed, remeasured
from attrim.methods.dcpa.supernet import Supernet
from attrim.methods.dcpa.watch import Watched
from attrim.modules.gates.places import find_places
from nets import Mobile, Plain, Residual, image

NETWORKS = [(Plain, 8), (Residual, 8), (Mobile, 16), (Dense, 8)]


def kept_of(m: Made, draw: Draw) -> dict[str, list[int]]:
    parts = {g: slice(o, o + m.channels[g].size) for g, o in m.space.offsets.items()}
    return {g: draw.mask[s].round().nonzero().flatten().tolist() for g, s in parts.items()}


@pytest.mark.parametrize(("network", "side"), NETWORKS)
@pytest.mark.parametrize("by_channel", [False, True])
def test_the_masked_network_is_the_derived_one_and_costs_what_was_said(
    network: type[nn.Module], side: int, by_channel: bool
) -> None:
    m = made(network(), side=side, by_channel=by_channel)
    supernet = Supernet(m.model, m.space)
    for seed in range(3):
        draw = m.policy.sample(1.0, torch.Generator().manual_seed(seed)).detach()
        kept = {g: k or [0] for g, k in kept_of(m, draw).items()}
        draw = m.policy.chosen({g: torch.tensor(k) for g, k in kept.items()})
        small = attrim.apply(m.model, attrim.plan_from_kept(m.channels, kept))
        with supernet.masked(draw), torch.no_grad():
            masked = m.model(m.x)
        assert torch.allclose(small(m.x), masked, rtol=0, atol=1e-9)
        counted = attrim.trace(small, m.x).cost.macs()
        assert counted == m.channels.cost.macs({g: len(k) for g, k in kept.items()})


def test_widths_and_kept_channels_say_the_same() -> None:
    m = made(Residual())
    derived = repair(m.space, m.prices, m.policy.log_probabilities(), m.limits)
    draw = m.policy.chosen(dict(derived.kept))
    again = m.policy.chosen({g: torch.tensor(k) for g, k in kept_of(m, draw).items()})
    assert torch.equal(draw.mask, again.mask)
    assert {g: len(k) for g, k in kept_of(m, draw).items()} == dict(derived.kept)


def test_gradients_are_those_of_masked_activations() -> None:
    """In a plain network a mask can hang behind each activation, which is what the weights' masks stand for."""
    m = made(Plain())
    draw = m.policy.chosen({"conv1": 5, "conv2": 7})
    flat = draw.mask.double().requires_grad_()
    with Supernet(m.model, m.space).masked(Draw(flat, draw.gates)):
        m.model(m.x).square().sum().backward()
    ours, weight = flat.grad, m.model.conv1.weight.grad
    m.model.zero_grad()
    other = draw.mask.double().requires_grad_()
    x = m.model.bn1(m.model.conv1(m.x)).relu() * other[:8].view(1, -1, 1, 1)
    x = m.model.bn2(m.model.conv2(x)).relu() * other[8:].view(1, -1, 1, 1)
    m.model.head(x.mean((2, 3))).square().sum().backward()
    assert ours is not None
    assert other.grad is not None
    assert torch.allclose(ours, other.grad, atol=1e-9)
    assert torch.allclose(weight, m.model.conv1.weight.grad, atol=1e-9)
    assert bool((ours[:8][m.policy.ranks[:8] >= 5] != 0).any())  # channels that are left out can come back


def test_a_dropped_block_returns_its_input_and_nothing_else_changes() -> None:
    m = made(Residual(), drop=True)
    block = m.model.layers[1]
    seen: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.__setitem__("in", args[0].detach())),
        block.register_forward_hook(lambda module, args, out: seen.__setitem__("out", out.detach())),
    ]
    with Supernet(m.model, m.space).masked(m.policy.chosen({}, ("layers.1",))), torch.no_grad():
        gone = m.model(m.x)
    assert torch.equal(seen["in"], seen["out"])
    for handle in handles:
        handle.remove()
    without = copy.deepcopy(m.model)
    without.layers[1] = nn.Identity()
    assert torch.equal(without(m.x), gone)
    assert not torch.allclose(m.model(m.x), gone)


def test_a_gate_has_the_gradient_of_its_branch() -> None:
    m = made(Mobile(), side=16, drop=True)
    gates = torch.ones(len(m.space.units), dtype=torch.float64, requires_grad=True)
    draw = m.policy.chosen({})
    with Supernet(m.model, m.space).masked(Draw(draw.mask.double(), gates)):
        m.model(m.x).square().sum().backward()
    found = gates.grad
    assert found is not None
    branches = [u for u, unit in enumerate(m.space.units) if unit.branch is not None]
    assert len(branches) == 3
    assert bool((found[branches] != 0).all())
    assert float(found.sum()) == float(found[branches].sum())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    handle = m.model.body[0].project.register_forward_hook(lambda module, args, out: out * scale)
    m.model(m.x).square().sum().backward()
    handle.remove()
    assert torch.allclose(found[branches[0]], scale.grad)


def test_a_branch_whose_last_module_is_the_users_own_is_gated_by_a_hook() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.own = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), Halved()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc((x + self.own(self.conv(x).tanh())).mean((2, 3)))

    m = made(Net(), drop=True)
    supernet = Supernet(m.model, m.space)
    branch = m.channels.branches[0]
    assert branch.gate == "own"
    with supernet.masked(m.policy.chosen({}, (branch.id,))):
        gone = m.model(m.x)
    expected = m.model.fc(m.model.stem(m.x).mean((2, 3)))
    assert torch.allclose(gone, expected)
    assert not m.model.own._forward_hooks


@pytest.mark.parametrize(("network", "side"), NETWORKS)
def test_the_model_is_as_before_afterwards_also_after_an_error(network: type[nn.Module], side: int) -> None:
    m = made(network(), side=side)
    supernet, draw = Supernet(m.model, m.space), m.policy.sample(None).detach()
    before = {n: (id(p), p.detach().clone()) for n, p in m.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), supernet.masked(draw):
        raise ZeroDivisionError
    with supernet.masked(draw), pytest.raises(InputError, match="masked already"), supernet.masked(draw):
        pass
    after = dict(m.model.named_parameters())
    assert list(after) == list(before)
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in after.items())


def test_two_paths_are_the_interpolated_sum_of_both_widths() -> None:
    m = made(Plain(), kind="free")
    m.policy.ranks.copy_(torch.cat([torch.arange(8), torch.arange(12)]))
    draw = m.policy.sample(1.0, torch.Generator().manual_seed(0), "tas")
    matrix = draw.mixes["conv1"].detach().double()
    most = int(draw.mask[:8].sum())
    assert bool((matrix[most:] == 0).all())
    assert bool((matrix[:, most:] == 0).all())
    assert torch.allclose(matrix[:most].sum(1), torch.ones(most, dtype=torch.float64))  # averages of channels
    plain = m.model
    u = plain.bn1(plain.conv1(m.x)).relu()
    mixed = torch.einsum("cd,ndhw->nchw", matrix, u)
    v = plain.bn2(plain.conv2(mixed)).relu()
    v = torch.einsum("cd,ndhw->nchw", draw.mixes["conv2"].detach().double(), v)
    expected = plain.head(v.mean((2, 3)))
    with Supernet(plain, m.space).masked(draw), torch.no_grad():
        assert torch.allclose(plain(m.x), expected, atol=1e-6)


def test_descriptors_are_means_behind_the_activation_before_the_mask() -> None:
    m = made(Residual())
    places = find_places(
        m.model, m.channels, point="post", groups=None, policy="internal", run=lambda: m.model(m.x)
    ).places
    watched, supernet = Watched(places, m.space), Supernet(m.model, m.space)
    block = m.model.layers[0]
    x = m.model.bn1(m.model.conv1(m.x)).relu()
    expected = block.bn1(block.conv1(x)).relu().mean((0, 2, 3))
    with watched.reading(m.model), torch.no_grad(), supernet.masked(m.policy.chosen({"layers.0.conv1": 1})):
        m.model(m.x)
        assert bool(watched.take().isnan().all())  # not active
        watched.active = True
        m.model(m.x)
    means = watched.take()
    first = m.space.offsets["layers.0.conv1"]
    assert torch.allclose(means[first : first + 16].double(), expected, atol=1e-6)
    stream = m.space.offsets["conv1"]
    assert bool(means[stream : stream + 16].isnan().all())  # a residual stream is not watched here
    assert all(not module._forward_hooks for module in m.model.modules())


def test_batch_norms_can_be_measured_for_a_drawn_network() -> None:
    m = made(Plain())
    batches = [image(8, 3, 8, 8, seed=s, dtype=torch.float64) for s in range(3)]
    supernet, draw = Supernet(m.model, m.space), m.policy.chosen({"conv1": 3})
    fresh = remeasured(m.model, supernet, draw, batches, 10)
    assert fresh is not m.model
    kept = kept_of(m, draw)
    small = attrim.apply(m.model, attrim.plan_from_kept(m.channels, kept))
    expected = attrim.recover.recalibrate(small, batches)
    assert torch.allclose(fresh.bn2.running_mean, expected.bn2.running_mean, atol=1e-9)
    assert not torch.allclose(fresh.bn2.running_mean, m.model.bn2.running_mean)
    assert remeasured(m.model, supernet, draw, batches, 0) is m.model
    both = Fixed(m.model, supernet, draw)
    with torch.no_grad():
        assert torch.allclose(both(m.x), small(m.x), atol=1e-9)


def test_recurrent_layers_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn, self.fc = nn.Conv2d(3, 6, 1), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(self.conv(x).relu().flatten(2).transpose(1, 2))[0][:, -1])

    m = made(Net())
    with pytest.raises(InputError, match="recurrent layer"):
        Supernet(m.model, m.space)


def test_the_supernet_keeps_hardly_more_for_the_backward_pass() -> None:
    """Masks are of the size of weights, not of activations."""
    m = made(Residual(), side=16, drop=True)
    m.model.train()
    supernet, x = Supernet(m.model, m.space), image(16, 3, 16, 16, dtype=torch.float64)

    def kept_for_backward(draw: Draw | None) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if draw is None:
                outputs = m.model(x)
            else:
                with supernet.masked(draw):
                    outputs = m.model(x)
        outputs.sum().backward()
        return sum(sizes.values())

    plain = kept_for_backward(None)
    draw = m.policy.sample(1.0, torch.Generator().manual_seed(0))
    assert kept_for_backward(draw.detach()) <= 1.1 * plain
    m.model.requires_grad_(False)
    assert kept_for_backward(draw) <= 1.3 * plain
