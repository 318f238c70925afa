"""The order of the held-out samples, and when a candidate is given up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attrim.methods.fast.heldout import HeldOut, few, small_enough
from attrim.methods.fast.stops import Doubt, Stop, lesson
from attrim.methods.fast.values import top1
from attrim.modules.batches import Batch, read_batch


def data(batches: int, seed: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 4, 4, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(batches)
    ]


def test_top1_leaves_negative_labels_out_and_says_how_clear_it_was() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 2.0], [1.0, 0.0, 0.0]])
    found = top1(scores, read_batch((scores, torch.tensor([0, 1, -1])), torch.device("cpu")))
    assert found.tolist() == [[1.0, 2.0], [0.0, 1.5]]


def test_held_out_samples_are_sorted_and_found_again() -> None:
    batches = [read_batch(b, torch.device("cpu")) for b in data(3, 4, size=5)]
    held = HeldOut(batches)
    clear = torch.rand(15, generator=torch.Generator().manual_seed(0))
    held.sort(clear)
    assert [b.size for b in held.batches] == [5, 5, 5]
    wanted = clear.argsort()
    came = torch.cat([b.labels for b in batches])
    now = torch.cat([b.labels for b in held.batches])
    assert torch.equal(now, came[wanted])
    assert torch.equal(held.arrived(now), came)
    assert torch.equal(held.present(came), now)
    held.sort(-clear)
    assert torch.equal(
        torch.cat([b.args[0] for b in held.batches]), torch.cat([b.args[0] for b in batches])[wanted.flip(0)]
    )


def test_samples_that_cannot_be_told_apart_stay_in_order() -> None:
    odd = [Batch((torch.zeros(4, 3), torch.zeros(7)), {}, torch.zeros(4), 4, None)]
    held = HeldOut(odd)
    held.sort(torch.arange(4.0).flip(0))
    assert not held.movable
    assert held.batches[0] is odd[0]
    assert few(odd[0]) is odd[0]


def test_doubt_is_the_mean_squared_difference_where_it_was_seen() -> None:
    doubt = Doubt()
    best = torch.ones(64)
    mine = torch.ones(64)
    mine[:32] = 0.0  # half of the places always differ
    for _ in range(1000):
        doubt.learn(lesson(mine, best))
    assert doubt.variance(0, 64) == pytest.approx(32, rel=0.01)
    assert doubt.variance(32, 64) == pytest.approx(0, abs=0.05)
    assert doubt.variance(64, 64) == 0.0
    stop = Stop(z=2.0)
    assert stop.hopeless(torch.zeros(40), best, doubt, 64)
    assert not stop.hopeless(torch.zeros(1), best, doubt, 64)
    assert not stop.hopeless(torch.ones(40), best, doubt, 64)


def test_what_the_smaller_calibration_says_is_trusted_as_far_as_it_was_right() -> None:
    best = torch.ones(64)
    mine = torch.cat([torch.zeros(16), torch.ones(48)])
    right, wrong = Doubt(), Doubt()
    for _ in range(1000):
        right.learn(lesson(mine, best, (mine[:32], best[:32])))
        wrong.learn(lesson(mine, best, (1 - mine[:32], best[:32])))  # each answer is another one in the end
    assert right.luck(32, 64, early=True) == pytest.approx(0, abs=0.1)
    assert wrong.luck(32, 64, early=True) == pytest.approx(32, rel=0.01)
    assert wrong.luck(32, 64, early=False) == pytest.approx(0, abs=0.1)
    assert right.tells_early(32, 64)
    assert not wrong.tells_early(32, 64)  # all it says is noise
    assert Doubt().tells_early(32, 64)  # how else would it be learned
    stop = Stop(z=2.0)
    assert not stop.hopeless(torch.zeros(8), best, Doubt(), 64, early=True)
    assert stop.hopeless(torch.zeros(8), best, right, 64, early=True)
    assert not stop.hopeless(torch.zeros(4), best, wrong, 64, early=True)
    assert stop.promising(torch.ones(8), best[:32], right, 64)
    assert not stop.promising(torch.ones(2), best[:32], right, 64)  # too few to say
    assert not stop.promising(torch.zeros(8), best[:32], right, 64)


def test_images_are_taken_in_parts_that_fit_into_a_cache() -> None:
    whole = Batch((torch.arange(20.0).reshape(20, 1),), {}, torch.arange(20), 20, None)
    parts = small_enough([whole], (1 << 20) / 9, torch.device("cpu"))
    assert [part.size for part in parts] == [9, 9, 2]
    assert torch.equal(torch.cat([part.args[0] for part in parts]), whole.args[0])
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert small_enough([whole], 1e9, torch.device("cpu"))[0].size == 8
    assert small_enough([whole], 1e9, torch.device("meta")) == [whole]
