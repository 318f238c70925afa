"""Batches of larger images: decoded and transformed while they are needed, by worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from attrim.errors import DataError
from attrim.recover.randomness import own_randomness, seed_all
from attrim.recover.sources import Rows

__all__ = ["PictureBatches"]

_CPU = torch.device("cpu")


class PictureBatches:
    """Iterable of ``(images, labels)`` over a table of encoded images.

    Order, crops and all else that is random follow from seed, epoch and row: neither the number of workers, nor the
    batch size, nor what was read before matters. The workers are started by the first pass and kept for the later ones;
    they end with this object. A pass that begins while another is under way has workers of its own.

    Args:
        rows: the images and labels.
        transform: makes a tensor of an image; may draw from torch's, NumPy's and Python's global generators.
        finish: what this process does with a batch of such tensors: normalising here leaves bytes to hand over.
        batch_size: images per batch.
        shuffle: whether the order changes with each epoch; a short last batch is dropped then, if there are others.
        seed: of order and transforms.
        workers: processes that decode; 0 decodes in this one, None takes one per core, four at most. May be set until
            the first pass.

    Raises:
        DataError: an image cannot be decoded (the row is named), or a worker died.

    Example:
        >>> batches = PictureBatches(rows, PictureTransform((224, 224), 3), Normalize(mean, std, 3), batch_size=128)
        >>> images, labels = next(iter(batches))
    """

    def __init__(
        self,
        rows: Rows,
        transform: Callable[[Any], Tensor],
        finish: Callable[[Tensor], Tensor] | None = None,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        self.rows, self.transform, self.finish, self.batch_size = rows, transform, finish, batch_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.workers = _cores() if workers is None else workers
        self.rank, self.world = 0, 1
        self._kept: _Loader | None = None
        self._busy = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and crops of the next pass."""
        self.epoch = epoch

    def for_process(self, rank: int, world: int) -> PictureBatches:
        """The same batches, of each only the rows of one process: every ``world``-th, beginning with the ``rank``-th.

        Together the processes read each row once. Of a batch with fewer rows than processes, some read the first.

        Raises:
            DataError: ``rank`` is not one of ``world`` processes.
        """
        if not 0 <= rank < world:
            raise DataError(f"for_process: expected 0 <= rank < world, found rank {rank} of {world}.")
        own = PictureBatches(
            self.rows,
            self.transform,
            self.finish,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            workers=self.workers,
        )
        own.rank, own.world, own.epoch = rank, world, self.epoch
        return own

    def __len__(self) -> int:
        whole = len(self.rows) // self.batch_size
        return whole if self.shuffle and whole else -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._pass(self.epoch)

    def _pass(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._busy:
            yield from self._read(self._loader(keep=False), epoch)
            return
        self._busy = True
        try:
            if self._kept is None:
                self._kept = self._loader(keep=True)
            yield from self._read(self._kept, epoch)
        except GeneratorExit:  # the caller has seen enough; the workers are well
            raise
        except BaseException:
            self._kept = None
            raise
        finally:
            self._busy = False

    def _read(self, loader: _Loader, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, batches = loader
        order.epoch = epoch
        try:
            for content in batches:
                if isinstance(content, str):
                    raise DataError(content)
                images, labels = content
                yield images if self.finish is None else self.finish(images), labels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that decodes images died: {str(error).splitlines()[0]} Often memory is short. Set "
                "batches.workers = 0 to decode without such processes."
            ) from error

    def _loader(self, *, keep: bool) -> _Loader:
        order = _Order(len(self.rows), self.batch_size, len(self), self.shuffle, self.seed, self.rank, self.world)
        workers = self.workers if len(self) > 1 else 0
        more: dict[str, Any] = {"worker_init_fn": _begin_worker, "persistent_workers": keep} if workers else {}
        loader: DataLoader[Any] = DataLoader(
            _Samples(self.rows, self.transform, self.seed),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # or it would draw from the global one
            **more,
        )
        return order, loader


class _Order(Sampler[list[tuple[int, int]]]):
    """The rows of each batch, with the epoch at each, because workers outlive epochs."""

    def __init__(
        self, rows: int, batch_size: int, batches: int, shuffle: bool, seed: int, rank: int, world: int
    ) -> None:
        self.rows, self.batch_size, self.batches = rows, batch_size, batches
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=random) if self.shuffle else torch.arange(self.rows)
        batches = torch.split(order, self.batch_size)[: self.batches]
        return self._own(batches, self.epoch)

    def _own(self, batches: Sequence[Tensor], epoch: int) -> Iterator[list[tuple[int, int]]]:
        for batch in batches:
            own = batch[self.rank :: self.world] if len(batch) > self.rank else batch[:1]
            yield [(epoch, index) for index in own.tolist()]


class _Samples(Dataset[Any]):
    def __init__(self, rows: Rows, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.rows, self.transform, self.seed = rows, transform, seed % 2**63

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, wanted: list[tuple[int, int]]) -> list[tuple[Tensor, int]] | str:
        """The samples, or what is wrong with one: an error would come out of a worker with a traceback for a message."""
        try:
            if get_worker_info() is not None:  # nobody else draws here
                return [self._sample(epoch, index) for epoch, index in wanted]
            with own_randomness(0, _CPU):
                return [self._sample(epoch, index) for epoch, index in wanted]
        except DataError as error:
            return str(error)

    def _sample(self, epoch: int, index: int) -> tuple[Tensor, int]:
        picture = self.rows.picture(index)
        seed_all(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1), _CPU)
        return self.transform(picture), int(self.rows.labels[index])


_Loader: TypeAlias = tuple[_Order, "DataLoader[Any]"]


def _stack(samples: list[tuple[Tensor, int]] | str) -> Any:
    return samples if isinstance(samples, str) else default_collate(samples)


def _begin_worker(_: int) -> None:
    """The main process hears Ctrl-C and ends its workers; a worker that dies of it would be missed by the next pass."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cores() -> int:
    """Cores for this process, four at most; those of the machine are shared with the processes of a launcher."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(4, allowed // max(1, int(beside) if beside.isdecimal() else 1)))
