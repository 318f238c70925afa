"""The batches of a training run: the same in every process and after a restart, each process taking its share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from attrim.errors import DataError
from attrim.modules.batches import Batch, read_batch
from attrim.recover.mixing import Mixer
from attrim.recover.randomness import Stream, seed_all

__all__ = ["Feed", "Portion", "length_of"]

_END = object()


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """What a process gets of a batch.

    Attributes:
        batch: its rows.
        size: how many of them count: 0 where there were fewer rows than processes, and a copy fills the place.
    """

    batch: Batch
    size: int


class Feed:
    """Goes through a source epoch by epoch.

    What is random about an epoch is drawn from a stream that begins with seed and epoch, so every process sees the same
    batches and an epoch can be begun in the middle: its first batches are read again and dropped. With several
    processes each takes every ``world``-th row of a batch. A ``DataLoader`` reads only those rows (the short last batch
    of a sampler that already divides by process is left as it is), any other source is read whole by every process,
    unless it has a method ``for_process(rank, world)`` that returns a source of the process's own rows.

    Args:
        source: batches; gone through once an epoch.
        seed: of the order and augmentation that draw from torch's, NumPy's or Python's global generator.
        device: where batches go.
        rank, world: this process, and how many there are.
    """

    def __init__(self, source: Iterable[Any], *, seed: int, device: torch.device, rank: int, world: int) -> None:
        self.steps = length_of(source)
        self.seed, self.device, self.rank, self.world = seed, device, rank, world
        self.mixer: Mixer | None = None
        self._asked = source
        self._source: Any = source
        self._divided = True
        if world > 1:
            self._source, self._divided = _divide(source, rank, world)
        self._stream = Stream()
        self._began: list[Tensor] = []

    def first(self) -> Batch:
        """A batch to look at, read outside any epoch; the source's own generators are as before afterwards."""
        before = self.states()
        with self._stream.use():
            self._begin(0)
            raw = next(iter(self._source), _END)
        self._restore(before)
        if raw is _END:
            raise DataError("data: expected at least one batch, found none.")
        return read_batch(raw, self.device)

    def epoch(self, epoch: int, skip: int = 0, began: list[Tensor] | None = None) -> Iterator[Portion]:
        """The portions of an epoch.

        Args:
            epoch: counted from 0.
            skip: batches to leave out at its beginning.
            began: states of the source's own generators at its beginning, from :attr:`generators`; None keeps them.

        Raises:
            DataError: the source gives another number of batches than its length promises.
        """
        if began is not None:
            self._restore(began)
        self._began = self.states()
        seen = 0
        with self._stream.use():
            self._begin(epoch)
            iterator = iter(self._source)
        while True:
            with self._stream.use():
                raw = next(iterator, _END)
                if raw is _END:
                    break
                seen += 1
                portion = self._portion(raw)
            if seen > self.steps:
                break
            if seen > skip:
                yield portion
        if seen != self.steps:
            count = f"more than {self.steps}" if seen > self.steps else str(seen)
            raise DataError(
                f"data: len(data) promises {self.steps} batches, epoch {epoch + 1} gave {count}. Expected the same number "
                "in every epoch: a DataLoader or a list."
            )

    @property
    def generators(self) -> list[Tensor]:
        """States of the source's own generators at the beginning of the present epoch."""
        return self._began

    def _begin(self, epoch: int) -> None:
        seed_all((self.seed * 1_000_003 + epoch) % 2**63, torch.device("cpu"))
        holders = (self._asked, self._source, getattr(self._asked, "sampler", None))
        for holder in {id(holder): holder for holder in holders}.values():
            set_epoch = getattr(holder, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    def _portion(self, raw: Any) -> Portion:
        batch = read_batch(raw, self.device)
        if self.mixer is not None:
            batch = self.mixer(batch)
        if self._divided:
            return Portion(batch, batch.size)
        count = len(range(self.rank, batch.size, self.world))
        rows = slice(self.rank, None, self.world) if count else slice(0, 1)
        return Portion(_rows(batch, rows, max(1, count)), count)

    def states(self) -> list[Tensor]:
        """States of the source's own generators now."""
        return [generator.get_state() for generator in _generators(self._asked)]

    def _restore(self, states: list[Tensor]) -> None:
        for generator, state in zip(_generators(self._asked), states, strict=False):
            generator.set_state(state)


def length_of(source: Any) -> int:
    """The number of batches in a source.

    Raises:
        DataError: it has no length, or none at all.
    """
    try:
        steps = len(source)
    except TypeError as error:
        raise DataError(
            f"data: fine-tuning goes through the data once an epoch and needs its length, found "
            f"{type(source).__name__} without one. Pass a DataLoader, or list(batches)."
        ) from error
    if not steps:
        raise DataError("data: expected at least one batch, found none.")
    return int(steps)


def _rows(batch: Batch, rows: slice, count: int) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim and len(value) == batch.size else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(item) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(cut(item) for item in value)
        return value

    return replace(
        batch, args=cut(batch.args), kwargs=cut(batch.kwargs), labels=cut(batch.labels), size=count, raw=cut(batch.raw)
    )


def _generators(source: Any) -> list[torch.Generator]:
    """Generators that a source was given and that no epoch number resets."""
    sampler = getattr(source, "sampler", None)
    holders = (source, sampler, getattr(getattr(source, "batch_sampler", None), "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _divide(source: Any, rank: int, world: int) -> tuple[Any, bool]:
    """The part of a source that one process reads, and whether that is its share already."""
    own = getattr(source, "for_process", None)
    if callable(own):
        return own(rank, world), True
    if not isinstance(source, DataLoader):
        return source, False
    if isinstance(source.sampler, DistributedSampler):
        return source, True
    if source.batch_sampler is None:
        return source, False
    extra: dict[str, Any] = {"prefetch_factor": source.prefetch_factor} if source.num_workers else {}
    share = DataLoader(
        source.dataset,
        batch_sampler=_Share(source.batch_sampler, rank, world),
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        generator=source.generator,
        persistent_workers=source.persistent_workers,
        **extra,
    )
    return share, True


class _Share(BatchSampler):
    """Every ``world``-th index of each batch; at least one, so that no process stands idle."""

    def __init__(self, whole: Iterable[list[int]], rank: int, world: int) -> None:
        self.whole, self.rank, self.world = whole, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.whole:
            mine = list(indices)
            yield mine[self.rank :: self.world] or mine[:1]

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]
