"""Two halves of the data: disjoint, stratified, the same in every epoch, whatever holds the batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from attrim.errors import AttrimWarning, DataError
from attrim.methods.dcpa.halves import halves, split_rows
from attrim.recover.tensors import TensorBatches


def rows(source: Any) -> list[tuple[int, int]]:
    """(number of the sample, class) of every row; the first entry of each sample is its number."""
    found = []
    for x, y in source:
        found += list(zip(x.reshape(len(x), -1)[:, 0].round().int().tolist(), y.tolist(), strict=True))
    return found


def check(one: Any, two: Any, count: int, whole: bool = True) -> None:
    a, b = rows(one), rows(two)
    assert not {n for n, _ in a} & {n for n, _ in b}
    if whole:
        assert len({n for n, _ in a} | {n for n, _ in b}) == count
        classes = Counter(y for _, y in a), Counter(y for _, y in b)
        assert all(abs(classes[0][c] - classes[1][c]) <= 1 for c in set(classes[0]) | set(classes[1]))


NUMBERS = torch.arange(50.0).view(-1, 1)
LABELS = torch.tensor([0] * 20 + [1] * 15 + [2] * 10 + [3] * 5)[
    torch.randperm(50, generator=torch.Generator().manual_seed(0))
]


def test_rows_are_split_class_by_class() -> None:
    one, two = split_rows(LABELS, 50, seed=3)
    assert sorted(one.tolist() + two.tolist()) == list(range(50))
    counts = [torch.bincount(LABELS[part], minlength=4).tolist() for part in (one, two)]
    assert all(abs(a - b) <= 1 for a, b in zip(*counts, strict=True))
    again, _ = split_rows(LABELS, 50, seed=3)
    other, _ = split_rows(LABELS, 50, seed=4)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(split_rows(None, 7)[0]) == 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_keeps_its_batch_size_and_the_halves_over_epochs(shuffle: bool) -> None:
    loader = DataLoader(TensorDataset(NUMBERS, LABELS), 8, shuffle=shuffle, generator=torch.Generator().manual_seed(0))
    one, two = halves(loader, 1)
    assert len(one) == len(two) == 4  # type: ignore[arg-type]
    check(one, two, 50)
    first = {n for n, _ in rows(one)}
    assert {n for n, _ in rows(one)} == first
    assert len(next(iter(one))[0]) == 8
    orders = rows(one), rows(one)
    assert (orders[0] == orders[1]) is not shuffle


def test_images_in_memory() -> None:
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 2, 2).contiguous()
    batches = TensorBatches(images, LABELS, mean=(0.0,), std=(1 / 255,), batch_size=6, shuffle=False)
    one, two = halves(batches)
    check(one, two, 50)
    assert isinstance(one, TensorBatches)
    one.set_epoch(3)
    assert one.epoch == 3
    assert batches.epoch == 0


def test_a_list_is_split_within_its_batches_and_joined_again() -> None:
    data = list(zip(NUMBERS.split(10), LABELS.split(10), strict=True))
    one, two = halves(data)
    check(one, two, 50)
    assert [len(x) for x, _ in one] == [len(x) for x, _ in one]
    assert max(len(x) for x, _ in one) >= 8
    dicts = [{"image": x, "labels": y} for x, y in data]
    first, second = halves(dicts)
    numbers = [{int(n) for batch in half for n in batch["image"][:, 0]} for half in (first, second)]
    assert not numbers[0] & numbers[1]
    assert len(numbers[0] | numbers[1]) == 50


def test_other_sources_are_split_with_a_warning() -> None:
    class Stream:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(list(zip(NUMBERS.split(10), LABELS.split(10), strict=True)))

    with pytest.warns(AttrimWarning, match="can only be split batch by batch"):
        one, two = halves(Stream())
    check(one, two, 50)
    assert len(one) == sum(1 for _ in one) == 3  # type: ignore[arg-type]


def test_too_little_data() -> None:
    with pytest.raises(DataError, match="at least two samples"):
        halves(DataLoader(TensorDataset(NUMBERS[:1], LABELS[:1]), 4))
    with pytest.raises(DataError, match="needs its length"):
        halves(iter([(NUMBERS, LABELS)]))
