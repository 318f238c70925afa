"""Two halves of the training data, of which one teaches the weights and the other the policy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset

from attrim.errors import AttrimWarning, DataError
from attrim.modules.batches import LABEL_KEYS
from attrim.recover.feed import length_of
from attrim.recover.loader import PictureBatches
from attrim.recover.tensors import TensorBatches

__all__ = ["halves", "split_rows"]


def split_rows(labels: Tensor | None, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Row numbers of two disjoint halves, each with half of every class (one row more or less), in rising order.

    Args:
        labels: shape ``(count,)``, class indices; None splits without looking at classes.
        count: rows in all.
        seed: decides which rows.

    Example:
        >>> split_rows(torch.tensor([0, 0, 1, 1]), 4)
        (tensor([1, 2]), tensor([0, 3]))
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=random)
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    return order[::2].sort().values, order[1::2].sort().values


def halves(source: Iterable[Any], seed: int = 0) -> tuple[Iterable[Any], Iterable[Any]]:
    """The batches of two disjoint halves of the samples, the same in every epoch and every process.

    Known kinds of source are split by their rows, stratified by class, and keep their batch size: what
    :func:`attrim.recover.open_data` gives, and a ``DataLoader`` over a data set with a length. Lists of batches are split
    batch by batch, each class in turn. Any other source too, with a warning: it has to give the same samples in the same
    order in every epoch.

    Args:
        source: batches with a length.
        seed: of the split.

    Raises:
        DataError: fewer than two samples, or no length.
    """
    length_of(source)
    if isinstance(source, TensorBatches):
        return _each(source, split_rows(source.labels, len(source.labels), seed), _tensor_rows)
    if isinstance(source, PictureBatches):
        labels = torch.from_numpy(np.asarray(source.rows.labels))
        return _each(source, split_rows(labels, len(labels), seed), _picture_rows)
    if _by_rows(source):
        data: Any = source
        return _each(source, split_rows(_labels_of(data.dataset), len(data.dataset), seed), _loader_rows)
    if not isinstance(source, list | tuple):
        warnings.warn(
            f"batches: a {type(source).__name__} can only be split batch by batch, so the two halves stay apart only if every "
            "epoch brings the same samples in the same order. Pass a DataLoader over a data set with a plain or shuffling "
            "sampler, a list, or policy_data=... of its own.",
            AttrimWarning,
            stacklevel=2,
        )
    return _Rows(source, 0), _Rows(source, 1)


def _by_rows(source: Any) -> bool:
    """Whether a loader's rows can be chosen: plain batches of a data set with a length."""
    plain = isinstance(source, DataLoader) and source.batch_size is not None and hasattr(source.dataset, "__len__")
    return plain and isinstance(source.sampler, RandomSampler | SequentialSampler)


def _each(source: Any, parts: tuple[Tensor, Tensor], pick: Any) -> tuple[Any, Any]:
    if not len(parts[1]):
        raise DataError("batches: expected at least two samples, so that weights and policy learn from different ones.")
    return pick(source, parts[0]), pick(source, parts[1])


def _tensor_rows(source: TensorBatches, rows: Tensor) -> TensorBatches:
    part = copy.copy(source)
    part.images, part.labels = source.images[rows], source.labels[rows]
    return part


def _picture_rows(source: PictureBatches, rows: Tensor) -> PictureBatches:
    part = PictureBatches(
        source.rows.pick(rows.numpy()),
        source.transform,
        source.finish,
        batch_size=source.batch_size,
        shuffle=source.shuffle,
        seed=source.seed,
        workers=source.workers,
    )
    part.rank, part.world = source.rank, source.world
    return part


def _loader_rows(source: DataLoader[Any], rows: Tensor) -> DataLoader[Any]:
    part: Any = Subset(source.dataset, rows.tolist())
    shuffled = isinstance(source.sampler, RandomSampler)
    sampler = RandomSampler(part, generator=source.sampler.generator) if shuffled else SequentialSampler(part)  # type: ignore[attr-defined]
    drop = source.drop_last and len(part) >= (source.batch_size or 1)
    extra: dict[str, Any] = {"prefetch_factor": source.prefetch_factor} if source.num_workers else {}
    return DataLoader(
        part,
        batch_sampler=BatchSampler(sampler, source.batch_size or 1, drop),
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        generator=source.generator,
        persistent_workers=source.persistent_workers,
        **extra,
    )


def _labels_of(dataset: Any) -> Tensor | None:
    """Class indices, where the data set keeps them in one of the usual places."""
    found: Any = next((getattr(dataset, n) for n in ("targets", "labels") if hasattr(dataset, n)), None)
    if found is None and getattr(dataset, "tensors", None):
        found = dataset.tensors[-1]
    if found is None:
        return None
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError):
        return None
    whole = labels.ndim == 1 and len(labels) == len(dataset) and not labels.is_floating_point()
    return labels if whole else None


class _Rows:
    """One half of every batch of a source, pairs of halves joined so that batches stay as large."""

    def __init__(self, source: Iterable[Any], half: int) -> None:
        self.source, self.half = source, half
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = (
                sum(1 for _ in self) if isinstance(self.source, list | tuple) else -(-length_of(self.source) // 2)
            )
        if not self._length:
            raise DataError(
                "batches: expected at least two samples, so that weights and policy learn from different ones."
            )
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the first: the halves have to stay apart."""
        fixed = getattr(self.source, "set_epoch", None)
        if callable(fixed):
            fixed(0)

    def __iter__(self) -> Iterator[Any]:
        turn: dict[int, int] = {}
        waiting: Any = None
        for batch in self.source:
            mine = self._part(batch, turn)
            if mine is None:
                continue
            if waiting is None:
                waiting = mine
                continue
            yield _joined(waiting, mine)
            waiting = None
        if waiting is not None:
            yield waiting

    def _part(self, batch: Any, turn: dict[int, int]) -> Any:
        size = _size(batch)
        labels = _labels(batch, size)
        chosen = []
        for row in range(size):
            label = int(labels[row]) if labels is not None else 0
            seen = turn.get(label, label)  # classes take turns in beginning with either half
            turn[label] = seen + 1
            if seen % 2 == self.half:
                chosen.append(row)
        return _picked(batch, torch.tensor(chosen), size) if chosen else None


def _size(batch: Any) -> int:
    if isinstance(batch, Tensor | np.ndarray):
        return len(batch)
    parts: Any = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((n for n in (_size(p) for p in parts) if n), 0)


def _labels(batch: Any, size: int) -> Any:
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[-1]
    if isinstance(found, Tensor) and found.ndim == 1 and len(found) == size and not found.is_floating_point():
        return found.tolist()
    return None


def _picked(value: Any, rows: Tensor, size: int) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        return value[rows if isinstance(value, Tensor) else rows.numpy()] if len(value) == size else value
    if isinstance(value, Mapping):
        return {key: _picked(item, rows, size) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_picked(item, rows, size) for item in value)
    return value


def _joined(one: Any, two: Any) -> Any:
    if isinstance(one, Tensor):
        return torch.cat([one, two]) if one.ndim else one
    if isinstance(one, np.ndarray):
        return np.concatenate([one, two]) if one.ndim else one
    if isinstance(one, Mapping):
        return {key: _joined(item, two[key]) for key, item in one.items()}
    if isinstance(one, list | tuple):
        return type(one)(_joined(a, b) for a, b in zip(one, two, strict=True))
    return one
