"""Labelled images, ready for a model: one call from a path to batches for training, choosing and testing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from attrim.errors import DataError
from attrim.modules.progress import progress
from attrim.recover.loader import PictureBatches
from attrim.recover.sources import Rows, Source, open_source
from attrim.recover.tensors import TensorBatches, decode

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Batches", "ImageData", "Split", "open_data"]

Split = Literal["train", "holdout", "test"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALL = 64
"""Images up to this many pixels on each side are kept in memory as bytes."""


class Batches(Protocol):
    """What :class:`ImageData` hands out: can be gone through many times, and knows its length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class ImageData:
    """Labelled images in three splits; each is decoded when it is first asked for, the test split too.

    Attributes:
        source: where the rows come from.
        shape: ``(channels, height, width)`` that the model takes.
        mean, std: per channel, of images in [0, 1].
        batch_size: images per batch.
        limit: the most training rows; the hold-out rows are limited alike, the test rows never.
        seed: of order and augmentation.
        flip: whether augmentation mirrors images left to right (not for digits or text).
    """

    source: Source
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 128
    limit: int | None = None
    seed: int = 0
    flip: bool = True
    _memory: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.source.classes

    def rows(self, split: Split) -> Rows:
        """The rows of a split.

        Raises:
            DataError: the source has no such split.
        """
        rows = self._all[split]
        if rows is None:
            raise DataError(f"'{self.source.name}' has no {split} split. It has: {', '.join(self.splits)}.")
        if self.limit is None or split == "test":
            return rows
        return rows.part(0, min(len(rows), self.limit))

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that there are."""
        return tuple(name for name, rows in self._all.items() if rows is not None)

    @property
    def _all(self) -> dict[Split, Rows | None]:
        return {"train": self.source.train, "holdout": self.source.holdout, "test": self.source.test}

    def batches(self, split: Split, *, augment: bool = False, shuffle: bool = False) -> Batches:
        """Batches of a split, plain or as for training.

        Args:
            split: ``train``, ``holdout`` (for every choice) or ``test`` (for the final figure only).
            augment: random crops and, where allowed, flips.
            shuffle: a new order each epoch (``set_epoch``).

        Example:
            >>> for images, labels in data.batches("train", augment=True, shuffle=True): ...
        """
        rows = self.rows(split)
        channels, height, width = self.shape
        if max(rows.picture(0).size) > SMALL:
            return PictureBatches(
                rows,
                size=(height, width),
                channels=channels,
                mean=self.mean,
                std=self.std,
                batch_size=self.batch_size,
                augment=augment,
                flip=self.flip,
                shuffle=shuffle,
                seed=self.seed,
            )
        images, labels = self._decoded(split, rows)
        return TensorBatches(
            images,
            labels,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            size=(height, width),
            crop=max(1, images.shape[-1] // 8) if augment else 0,
            flip=self.flip and augment,
            shuffle=shuffle,
            seed=self.seed,
        )

    def _decoded(self, split: str, rows: Rows) -> tuple[Tensor, Tensor]:
        if split not in self._memory:
            pictures = progress(rows.pictures(), f"reading {split} images", len(rows))
            self._memory[split] = decode(pictures, self.shape[0]), torch.from_numpy(rows.labels)
        return self._memory[split]


def open_data(
    source: str,
    *,
    shape: tuple[int, int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    flip: bool = True,
) -> ImageData:
    """Open labelled images for a model.

    Args:
        source: see :func:`attrim.recover.sources.open_source`.
        shape: ``(channels, height, width)`` that the model takes; channels 1 or 3.
        mean, std: per channel, of images in [0, 1]; for one channel a single number, or the mean of three.
        batch_size: images per batch.
        limit: read only the first training rows.
        seed: of order and augmentation.
        flip: whether augmentation mirrors images.

    Raises:
        DataError: the source cannot be read, or an argument is out of its range.

    Example:
        >>> data = open_data("data/cifar10", shape=(3, 32, 32), limit=10_000)
        >>> attrim.recover.evaluate(model, data.batches("holdout"))
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(f"shape: expected (channels, height, width) with 1 or 3 channels, found {tuple(shape)}.")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise DataError(f"{name}: expected an int >= 1, found {value!r}.")
    if shape[0] == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return ImageData(open_source(source), shape, tuple(mean), tuple(std), batch_size, limit, seed, flip)
