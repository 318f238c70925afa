"""Larger images: the same batches however they are read, workers that outlive epochs, and trouble that is named."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from attrim.errors import DataError
from attrim.recover.feed import Feed
from attrim.recover.loader import PictureBatches


class Numbers:
    """Rows whose images are their own numbers; the ninth of ten is broken where asked."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.labels = np.arange(count, dtype=np.int64)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> int:
        if index == self.broken:
            raise DataError(f"row {index} has an image that cannot be decoded")
        return index


def noisy(picture: int) -> torch.Tensor:
    """The number, and a draw from each of the three generators that transforms use."""
    return torch.tensor([picture, torch.rand(()).item(), np.random.rand(), random.random()])  # noqa: NPY002


def with_pid(picture: int) -> torch.Tensor:
    return torch.tensor([picture, os.getpid()])


def dying(picture: int) -> torch.Tensor:
    if picture == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.tensor([picture])


def batches(count: int = 10, transform=noisy, **options) -> PictureBatches:
    rows = Numbers(count, options.pop("broken", None))
    return PictureBatches(rows, transform, **{"batch_size": 4, "workers": 0, **options})


def flat(source) -> torch.Tensor:
    return torch.cat([images for images, _ in source])


def test_workers_change_nothing():
    own, two = batches(shuffle=True, seed=3), batches(shuffle=True, seed=3, workers=2)
    for epoch in (0, 1):
        own.set_epoch(epoch)
        two.set_epoch(epoch)
        for (x, y), (x2, y2) in zip(own, two, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
            assert torch.equal(x[:, 0].long(), y)


def test_a_row_draws_by_seed_and_epoch_alone():
    first = flat(batches())
    assert torch.equal(first, flat(batches(batch_size=3)))
    mixed = flat(batches(shuffle=True, batch_size=10))
    assert mixed[:, 0].tolist() != first[:, 0].tolist()
    assert torch.equal(mixed[mixed[:, 0].argsort()], first)
    again = batches()
    again.set_epoch(1)
    other = flat(again)
    assert (other[:, 1:] != first[:, 1:]).all()
    again.set_epoch(0)
    assert torch.equal(flat(again), first)
    assert (flat(batches(seed=1))[:, 1:] != first[:, 1:]).all()
    assert len(first[:, 1:].unique()) == 30  # no row is like another


def test_the_callers_random_states_are_left_alone():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    expected = noisy(0)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    flat(batches()), flat(batches(workers=1))
    assert torch.equal(noisy(0), expected)


def test_the_short_batch_is_dropped_when_shuffling():
    assert [len(y) for _, y in batches(shuffle=True)] == [4, 4]
    assert [len(y) for _, y in batches()] == [4, 4, 2]
    assert len(batches(shuffle=True)) == 2
    assert [len(y) for _, y in batches(3, shuffle=True)] == [3]


def test_workers_are_kept_between_epochs_and_end_with_the_batches():
    source = batches(24, with_pid, workers=2)
    first, again = (set(flat(source)[:, 1].tolist()) for _ in range(2))
    assert first == again
    assert len(first) == 2
    assert os.getpid() not in first
    del source
    gc.collect()
    end = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{int(pid)}") for pid in first) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{int(pid)}") for pid in first)


def test_a_pass_left_early_does_not_leak_into_the_next():
    source = batches(24, workers=2)
    next(iter(source))
    assert flat(source)[:, 0].tolist() == list(range(24))


def test_two_passes_at_once():
    source = batches(24, workers=1)
    for (x, _), (x2, _) in zip(source, source, strict=True):
        assert torch.equal(x, x2)


def test_an_epoch_is_chosen_when_the_pass_begins():
    source = batches(shuffle=True)
    begun = iter(source)
    source.set_epoch(5)
    assert torch.equal(flat(begun), flat(batches(shuffle=True)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_the_batches_stay_usable(workers):
    source = batches(10, broken=9, workers=workers)
    for _ in range(2):
        with pytest.raises(DataError, match=r"^row 9 has an image that cannot be decoded$"):
            list(source)


def test_a_dead_worker_is_an_error_that_says_what_to_do():
    source = batches(10, dying, workers=1)
    with pytest.raises(DataError, match=r"a process that decodes images died: .*Set batches\.workers = 0"):
        list(source)


@pytest.mark.parametrize(("count", "world"), [(10, 2), (10, 3), (24, 4)])
def test_processes_share_each_batch(count, world):
    whole = batches(count, shuffle=True, seed=2)
    shares = [whole.for_process(rank, world) for rank in range(world)]
    for source in (whole, *shares):
        source.set_epoch(4)
    assert {len(source) for source in shares} == {len(whole)}
    for (x, y), *own in zip(whole, *shares, strict=True):
        for rank, (mine, labels) in enumerate(own):
            assert torch.equal(mine, x[rank::world])
            assert torch.equal(labels, y[rank::world])


def test_a_process_without_a_row_reads_the_first():
    last = [list(batches(9).for_process(rank, 4))[-1][1].tolist() for rank in range(4)]
    assert last == [[8], [8], [8], [8]]
    with pytest.raises(DataError, match="expected 0 <= rank < world, found rank 2 of 2"):
        batches().for_process(2, 2)


def test_the_trainer_takes_each_process_its_share():
    source = batches(10, shuffle=True)
    shares = [Feed(source, seed=1, device=torch.device("cpu"), rank=rank, world=2) for rank in range(2)]
    for epoch in range(2):
        portions = [list(feed.epoch(epoch)) for feed in shares]
        source.set_epoch(epoch)
        for (_, y), *own in zip(source, *portions, strict=True):
            assert [portion.size for portion in own] == [2, 2]
            assert [portion.batch.labels.tolist() for portion in own] == [y[0::2].tolist(), y[1::2].tolist()]


INTERRUPTED = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = [{folder!r}]
from test_loader import batches
source = batches(4000, workers=2)
try:
    for i, _ in enumerate(source):
        if i == 3:
            os.killpg(0, signal.SIGINT)  # what Ctrl-C does
            time.sleep(5)
except KeyboardInterrupt:
    sys.stdout.write("interrupted ")
sys.stdout.write(str(sum(len(y) for _, y in source)))
"""


def test_ctrl_c_ends_a_pass_and_leaves_no_process_behind():
    code = INTERRUPTED.format(folder=os.path.dirname(__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("interrupted 4000", "", 0)
    with pytest.raises(ProcessLookupError):  # nothing is left of the group
        os.killpg(process.pid, 0)
