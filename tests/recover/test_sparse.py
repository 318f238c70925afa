"""Penalties of sparse training: values and gradients against naive loops, and channels that a cut no longer hurts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrim
from attrim.core.scores import Scores
from attrim.errors import CriterionError, InputError, PlanError
from attrim.modules.names import named_tensors
from attrim.recover import finetune, output_gap
from attrim.recover.sparse import ChannelEnergy, GroupLasso, GrowingL2
from nets import Attention, Inverted, Residual, filled, image

ROLES = ("out", "in", "scale", "shift")


class Loop(nn.Module):
    """A convolution whose inputs and outputs are one group, tied through a shortcut; its kernel serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.again.weight = self.inner.weight
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.inner(x).relu()
        x = self.norm(x + self.again(x).relu())
        return self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))


NETS = {
    "residual": (lambda: Residual((4, 6), 1), (1, 3, 8, 8)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Inverted(4, 4, 1), nn.Conv2d(4, 2, 1)), (1, 3, 8, 8)),
    "loop": (Loop, (1, 3, 8, 8)),
    "attention": (Attention, (1, 5, 12)),
}


@pytest.fixture(params=NETS, scope="module")
def case(request):
    make, shape = NETS[request.param]
    torch.manual_seed(0)
    model = filled(make()).double()
    return model, attrim.trace(model, image(*shape, dtype=torch.float64))


def entries(model: nn.Module, group, channel: int) -> list[Tensor]:
    """The entries of one channel, each once, by a mask over every tensor."""
    tensors = named_tensors(model).tensors
    masks: dict[str, Tensor] = {}
    for member in group.with_role(*ROLES):
        tensor = tensors[member.axis.tensor]
        mask = masks.setdefault(member.axis.tensor, torch.zeros(tensor.shape, dtype=torch.bool))
        mask.transpose(0, member.axis.dim)[member.index[channel].tolist()] = True
    return [tensors[name][mask] for name, mask in masks.items()]


def naive_lasso(model, channels, gamma) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for group in channels:
        for c in range(group.size):
            flat = torch.cat([part.flatten() for part in entries(model, group, c)])
            total = total + gamma(group, c) * flat.norm() / len(flat) ** 0.5
    return total


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def assert_same(value: Tensor, naive: Tensor, model: nn.Module) -> None:
    torch.testing.assert_close(value, naive, rtol=1e-10, atol=0)
    for ours, theirs in zip(gradients(value, model), gradients(naive, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_energies_and_counts_equal_a_loop_over_the_channels(case):
    model, channels = case
    energy = ChannelEnergy(channels)
    found = energy(model)
    for group in channels:
        for c in range(group.size):
            flat = torch.cat([part.flatten() for part in entries(model, group, c)])
            assert found[energy.offsets[group.id] + c].item() == pytest.approx(flat.square().sum().item(), rel=1e-10)
            assert energy.counts[energy.offsets[group.id] + c] == len(flat)


def test_the_loop_has_a_diagonal_that_counts_once():
    model = filled(Loop())
    channels = attrim.trace(model, image(1, 3, 8, 8))
    (group,) = channels
    assert ChannelEnergy(channels).counts.tolist() == [27 + 1 + (2 * 54 - 9) + 1 + 1 + 2 + 64] * 6
    assert [m.axis.tensor for m in group.with_role(*ROLES)].count("inner.weight") == 2


def test_group_lasso_equals_a_naive_loop(case):
    model, channels = case
    assert_same(GroupLasso(channels, 0.3)(model, 0.5), 0.3 * naive_lasso(model, channels, lambda *_: 1.0), model)


def test_pressure_by_scores_is_two_to_the_spread_for_the_weakest(case):
    model, channels = case
    rng = np.random.default_rng(0)
    values = {g.id: rng.uniform(size=g.size).astype(np.float32) for g in channels}
    penalty = GroupLasso(channels, 2.0, Scores(values, "mine"), spread=3.0)

    def gamma(group, c):
        own = values[group.id].astype(np.float64)
        return 2 ** (3.0 * (own.max() - own[c]) / (own.max() - own.min()))

    found = penalty(model, 0.0)
    torch.testing.assert_close(found, 2.0 * naive_lasso(model, channels, gamma), rtol=1e-6, atol=0)


def test_pressure_by_importance_follows_the_weights(case):
    model, channels = case
    norms = {}
    for g in channels:
        flats = [torch.cat([p.flatten() for p in entries(model, g, c)]) for c in range(g.size)]
        norms[g.id] = [(flat.norm() / len(flat) ** 0.5).item() for flat in flats]

    def gamma(group, c):
        own = norms[group.id]
        return 2 ** (4.0 * (max(own) - own[c]) / (max(own) - min(own)))

    assert_same(GroupLasso(channels, 1.0, "importance")(model, 1.0), naive_lasso(model, channels, gamma), model)


def test_zero_channels_have_no_gradient_and_equal_ones_the_same_weight():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    channels = attrim.trace(model, image(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0, 0], [0, 0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 0, 0]]))
    value = GroupLasso(channels, 1.0)(model, 0.0)
    assert value.item() == pytest.approx(5 / 3**0.5)
    first, second = gradients(value, model)
    torch.testing.assert_close(first, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]]) / 3**0.5)
    assert second.tolist() == [[0, 0, 0]]
    with torch.no_grad():
        model[0].weight.fill_(1)
    assert GroupLasso(channels, 1.0, "importance")(model, 0.0).item() == pytest.approx(3 * (2 / 3) ** 0.5)


def half(channels) -> attrim.PruningPlan:
    return attrim.plan_from_kept(channels, {g.id: range(0, g.size, 2) for g in channels})


def test_growing_l2_presses_exactly_what_the_plan_removes(case):
    model, channels = case
    plan = half(channels)
    penalty = GrowingL2(channels, plan, ceiling=4.0, every=0.25)
    value = penalty(model, 0.3)
    doomed = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for group in channels:
        for member in group.with_role(*ROLES):
            if member.axis.tensor in doomed:
                for c in range(1, group.size, 2):
                    doomed[member.axis.tensor].transpose(0, member.axis.dim)[member.index[c].tolist()] = True
    for (name, p), gradient in zip(model.named_parameters(), gradients(value, model), strict=True):
        torch.testing.assert_close(gradient, 2.0 * p * doomed[name], rtol=1e-12, atol=0)  # half of the ceiling
    expected = sum((p.detach()[doomed[name]] ** 2).sum() for name, p in model.named_parameters())
    torch.testing.assert_close(value.detach(), expected)


def test_the_strength_grows_in_steps():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    channels = attrim.trace(model, image(1, 2))
    penalty = GrowingL2(channels, half(channels), ceiling=8.0, every=0.25)
    assert [penalty.strength(p) for p in (0, 0.24, 0.25, 0.5, 0.75, 0.99, 1)] == [2, 2, 4, 6, 8, 8, 8]
    assert GrowingL2(channels, half(channels), 1.0, every=0.3).strength(1) == 1


def blobs(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Two kinds of picture, told apart by where their bright corner is."""
    out = []
    for seed in range(count):
        x, y = image(32, 3, 8, 8, seed=seed), torch.arange(32) % 2
        x[y == 0, :, :4, :4] += 1.0
        x[y == 1, :, 4:, 4:] += 1.0
        out.append((x, y))
    return out


def test_after_growing_l2_the_cut_changes_next_to_nothing():
    torch.manual_seed(0)
    model = Residual((8, 8), 1, classes=2)
    data = blobs()
    model = finetune(model, data, epochs=1, lr=0.05)
    channels = attrim.trace(model, image(1, 3, 8, 8))
    plan = half(channels)
    gaps, errors = {}, {}
    for name, penalty in (("with", GrowingL2(channels, plan, ceiling=20.0, every=0.1)), ("without", None)):
        trained = finetune(model, data, epochs=8, lr=0.05, regularizer=penalty)
        small = attrim.apply(trained, plan)
        gaps[name] = output_gap(trained, small, data)
        errors[name] = 1 - attrim.recover.evaluate(small, data)
        if name == "with":
            energy = ChannelEnergy(channels)(trained)
            doomed = torch.cat([torch.arange(g.size) % 2 == 1 for g in channels])
            assert energy[doomed].max() < 1e-3 * energy[~doomed].min()
            assert attrim.recover.evaluate(trained, data) > 0.95
    assert gaps["with"] < 1e-3 < 0.05 < gaps["without"]
    assert errors["with"] < 0.05


def test_group_lasso_trains_and_empties_the_weak_channels():
    torch.manual_seed(0)
    data = blobs(4)
    model = finetune(Residual((8, 8), 1, classes=2), data, epochs=1, lr=0.05)
    channels = attrim.trace(model, image(1, 3, 8, 8))
    energies = []
    for penalty in (None, GroupLasso(channels, 1.0, "importance")):
        trained = finetune(model, data, epochs=6, lr=0.05, regularizer=penalty)
        energies.append(ChannelEnergy(channels)(trained).detach())
    assert energies[1].min() < 0.05 * energies[0].min()
    assert energies[1].sum() < 0.7 * energies[0].sum()


def test_wrong_arguments():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    channels = attrim.trace(model, image(1, 2))
    other = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1))
    with pytest.raises(InputError, match="strength: expected a number > 0, found 0"):
        GroupLasso(channels, 0)
    with pytest.raises(InputError, match="weights: expected None, 'importance' or Scores, found 'l2'"):
        GroupLasso(channels, 1.0, "l2")
    with pytest.raises(InputError, match="spread: expected a number >= 0"):
        GroupLasso(channels, 1.0, spread=-1)
    with pytest.raises(CriterionError, match="weights: the scores do not fit the channel map at group '0'"):
        GroupLasso(channels, 1.0, Scores({"0": [1.0]}, "mine"))
    with pytest.raises(InputError, match=r"expected '0.weight' with shape \(4, 2\), found \(5, 2\)"):
        GroupLasso(channels, 1.0)(other, 0.0)
    with pytest.raises(InputError, match="every: expected a share of the run"):
        GrowingL2(channels, half(channels), 1.0, every=0)
    with pytest.raises(PlanError, match="made for another network"):
        GrowingL2(attrim.trace(other, image(1, 2)), half(channels), 1.0)
    with pytest.raises(PlanError, match="the plan removes nothing"):
        GrowingL2(channels, attrim.plan_from_kept(channels, {}), 1.0)
    with pytest.raises(InputError, match="the penalty belongs to another model"):
        GrowingL2(channels, half(channels), 1.0)(attrim.apply(model, half(channels)), 0.0)
    with pytest.raises(InputError, match="nothing in this network can be pruned"):
        GroupLasso(attrim.trace(nn.Linear(2, 3), image(1, 2)), 1.0)
