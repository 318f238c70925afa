"""Draws: one-hot with the gradient of the soft sample, frequencies of the softmax, two parts, two paths."""

from __future__ import annotations

import math

import pytest
import torch
from made import made

from attrim.methods.dcpa.sample import Temperature, pick, switch, two_paths
from nets import Mobile, Plain, Residual

PAD = -1e4


def test_choices_are_one_hot_and_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, PAD]], requires_grad=True)
    drop = torch.tensor([False, False])
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(2, 3)
    for _ in range(4000):
        choice, gates = pick(logits, drop, 1.0, generator)
        assert gates.tolist() == [1.0, 1.0]
        total += choice.detach()
    assert torch.allclose(total / 4000, logits.detach().softmax(1), atol=0.02)
    assert total[1, 2] == 0
    one = choice.detach()
    assert torch.allclose(one.sum(1), torch.ones(2))
    assert torch.allclose(one, one.round(), atol=1e-6)


def test_keep_or_drop_is_drawn_apart_from_the_width() -> None:
    logits = torch.tensor([[8.0, 0.0, 1.0], [0.0, 0.0, 1.0]], requires_grad=True)
    drop = torch.tensor([True, True])
    generator = torch.Generator().manual_seed(0)
    gone = torch.zeros(2)
    for _ in range(500):
        choice, gates = pick(logits, drop, 1.0, generator)
        assert choice.detach()[:, 0].abs().max() < 1e-6
        gone += 1 - gates.detach()
    assert torch.allclose(gone / 500, logits.detach().softmax(1)[:, 0], atol=0.06)
    gates.sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] < 0).all()  # more of "drop" closes the gate
    choice, gates = pick(logits, drop, None, None)
    assert choice.detach().argmax(1).tolist() == [2, 2]
    assert gates.detach().tolist() == [0.0, 1.0]


def test_soft_samples_sum_to_one() -> None:
    logits = torch.tensor([[0.3, 0.1, 0.2]])
    choice, gates = pick(logits, torch.tensor([True]), 0.5, torch.Generator().manual_seed(0), soft=True)
    assert float(choice.sum()) == pytest.approx(1.0)
    assert 0 < float(gates) < 1
    assert len(set(choice[0].tolist())) == 3


def test_gates_of_channels() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3)
    for _ in range(3000):
        opened = switch(logits, 0.7, generator)
        total += opened.detach()
    assert torch.allclose(total / 3000, logits.detach().sigmoid(), atol=0.03)
    opened.sum().backward()
    assert logits.grad is not None
    assert (logits.grad > 0).all()
    assert switch(logits, None, None).tolist() == [0.0, 1.0, 1.0]


def test_two_paths_are_distinct_and_weighted() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, PAD], [5.0, 1.0, PAD, PAD]], requires_grad=True)
    drop = torch.tensor([False, True])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        index, weights, gates = two_paths(logits, drop, 1.0, generator)
        assert index[0, 0] != index[0, 1]
        assert int(index[0].max()) < 3
        assert index[1].tolist() == [1, 1]  # the only width besides "drop"
        assert torch.allclose(weights.sum(1), torch.ones(2))
        assert set(gates.detach().round().tolist()) <= {0.0, 1.0}
    weights[0, 0].backward()
    assert logits.grad is not None
    assert float(logits.grad[0].abs().sum()) > 0


def test_the_temperature_falls_on_a_cosine() -> None:
    tau = Temperature(5.0, 0.1)
    assert tau(0.0) == 5.0
    assert tau(0.5) == pytest.approx(2.55)
    assert tau(0.999) == pytest.approx(0.1, abs=1e-4)
    assert all(tau(t / 20) > tau((t + 1) / 20) for t in range(20))


def test_a_draw_keeps_the_first_channels_of_each_order() -> None:
    m = made(Residual(), drop=True)
    draw = m.policy.sample(1.0, torch.Generator().manual_seed(5))
    mask = draw.mask.detach()
    assert set(mask.round().tolist()) == {0.0, 1.0}
    assert torch.allclose(mask, mask.round(), atol=1e-6)
    for u, unit in enumerate(m.space.units):
        for column, group in enumerate(unit.groups):
            part = slice(m.space.offsets[group], m.space.offsets[group] + m.channels[group].size)
            kept = mask[part].round().bool()
            assert int(kept.sum()) in unit.widths[:, column].tolist()
            assert int(kept.sum()) > 0
            assert sorted(m.policy.ranks[part][kept].tolist()) == list(range(int(kept.sum())))
        assert unit.branch is not None or float(draw.gates[u].detach()) == 1.0


def test_draws_depend_on_the_generator_alone() -> None:
    m = made(Mobile(), side=16)
    torch.manual_seed(0)
    one = m.policy.sample(2.0, torch.Generator().manual_seed(3))
    torch.manual_seed(9)
    two = m.policy.sample(2.0, torch.Generator().manual_seed(3))
    assert torch.equal(one.mask, two.mask)


def test_the_warm_up_draws_all_widths_alike_and_drops_nothing() -> None:
    m = made(Plain(), ratios=(0.25, 0.5, 0.75))
    generator = torch.Generator().manual_seed(0)
    counts: dict[int, int] = {}
    for _ in range(800):
        draw = m.policy.anything(generator)
        width = int(draw.mask[:8].sum())
        counts[width] = counts.get(width, 0) + 1
        assert bool((draw.gates == 1).all())
    assert sorted(counts) == [2, 4, 6, 8]
    assert all(math.isclose(n / 800, 0.25, abs_tol=0.05) for n in counts.values())
