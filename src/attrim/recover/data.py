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
from attrim.recover.tensors import Normalize, TensorBatches, decode
from attrim.recover.transforms import INTERPOLATIONS, PictureTransform, RandAugment

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Batches", "ImageData", "Split", "open_data"]

Split = Literal["train", "holdout", "test"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALL = 64
"""Images up to this many pixels on each side are kept in memory as bytes,"""

MEMORY = 4 * 2**30
"""if a split takes no more bytes than this,"""

PROBES = 32
"""and if so many images, evenly spread over the rows, are all of one size."""


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
        interpolation: how larger images are resized: ``bilinear``, ``bicubic``, ``lanczos`` or ``nearest``.
        crop_pct: share of each side that the middle crop of larger images keeps, in (0, 1].
        randaugment: timm's notation for RandAugment when training, None for none.
        workers: processes that decode larger images, None for one per core (four at most).
    """

    source: Source
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 128
    limit: int | None = None
    seed: int = 0
    flip: bool = True
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    randaugment: str | None = None
    workers: int | None = None
    _memory: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _sizes: list[tuple[int, int] | None] = field(default_factory=list)

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

    def batches(self, split: Split, *, augment: bool | Literal["light"] = False, shuffle: bool = False) -> Batches:
        """Batches of a split, plain or as for training.

        They are decided by seed and epoch (``set_epoch``; 0 at first) and are the same in every process: sharing them
        out is up to the loop (:func:`attrim.modules.distributed.share`; :func:`attrim.recover.finetune` does it).

        Args:
            split: ``train``, ``holdout`` (for every choice) or ``test`` (for the final figure only).
            augment: True for random crops, flips where allowed, and RandAugment where asked for; ``"light"`` without
                RandAugment, for measuring statistics.
            shuffle: a new order each epoch; a short last batch is dropped then, if there are others.

        Raises:
            DataError: the source has no such split, or an image cannot be decoded.

        Example:
            >>> for images, labels in data.batches("train", augment=True, shuffle=True): ...
        """
        if augment not in (True, False, "light"):
            raise DataError(f"augment: expected True, False or 'light', found {augment!r}.")
        rows = self.rows(split)
        if self._size() is None:
            return self._pictures(rows, augment, shuffle)
        return self._tensors(split, rows, augment, shuffle)

    def _pictures(self, rows: Rows, augment: bool | str, shuffle: bool) -> Batches:
        channels, *size = self.shape
        transform = PictureTransform(
            (size[0], size[1]),
            channels,
            train=bool(augment),
            flip=self.flip,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            randaugment=self._randaugment((size[0], size[1])) if augment is True else None,
        )
        normalize = Normalize(self.mean, self.std, channels)
        return PictureBatches(
            rows,
            transform,
            normalize,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            workers=self.workers,
        )

    def _tensors(self, split: Split, rows: Rows, augment: bool | str, shuffle: bool) -> Batches:
        images, labels = self._decoded(split, rows)
        height, width = images.shape[-2:]
        extra = self._randaugment((height, width)) if augment is True else None
        return TensorBatches(
            images,
            labels,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            size=self.shape[1:],
            crop=max(1, width // 8) if augment else 0,
            flip=self.flip and bool(augment),
            shuffle=shuffle,
            seed=self.seed,
            change=None if extra is None else extra.batch,
        )

    def _randaugment(self, size: tuple[int, int]) -> RandAugment | None:
        return None if self.randaugment is None else RandAugment(self.randaugment, size, self.mean)

    def _size(self) -> tuple[int, int] | None:
        """``(width, height)`` of the images if they can be kept in memory; one answer for all the splits."""
        if not self._sizes:
            rows = next(rows for rows in self._all.values() if rows is not None)
            count = min(PROBES, len(rows))
            probes = {rows.picture(i * len(rows) // count).size for i in range(count)}
            width, height = next(iter(probes))
            needed = self.shape[0] * width * height * max(len(r) for r in self._all.values() if r is not None)
            small = len(probes) == 1 and max(width, height) <= SMALL and needed <= MEMORY
            self._sizes.append((width, height) if small else None)
        return self._sizes[0]

    def _decoded(self, split: str, rows: Rows) -> tuple[Tensor, Tensor]:
        if split not in self._memory:
            pictures = progress(rows.pictures(), f"reading {split} images", len(rows))
            self._memory[split] = decode(pictures, self.shape[0], self._size()), torch.from_numpy(rows.labels)
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
    interpolation: str = "bilinear",
    crop_pct: float = 0.875,
    randaugment: str | None = None,
    workers: int | None = None,
) -> ImageData:
    """Open labelled images for a model.

    Args:
        source: see :func:`attrim.recover.sources.open_source`.
        shape: ``(channels, height, width)`` that the model takes; channels 1 or 3.
        mean, std: per channel, of images in [0, 1]; for one channel a single number, or the mean of three.
        batch_size: images per batch.
        limit: read only the first training rows. The hold-out split is the same whatever the limit, and as many of its
            first rows are read.
        seed: of order and augmentation; the splits do not depend on it.
        flip: whether augmentation mirrors images.
        interpolation: how images above 64 x 64 are resized: ``bilinear``, ``bicubic``, ``lanczos`` or ``nearest``.
        crop_pct: share of each side that the middle crop of such images keeps, in (0, 1]. timm's
            ``resolve_model_data_config(model)`` knows both figures of its models.
        randaugment: adds timm's RandAugment to augmented images: ``"rand-m9-mstd0.5"``.
        workers: processes that decode images above 64 x 64; 0 for none, None for one per core (four at most).

    Raises:
        DataError: the source cannot be read, or an argument is out of its range.
        MissingDependencyError: a package is not installed: ``datasets``, or timm for RandAugment.

    Example:
        >>> data = open_data("data/cifar10", shape=(3, 32, 32), limit=10_000)
        >>> attrim.recover.evaluate(model, data.batches("holdout"))
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(f"shape: expected (channels, height, width) with 1 or 3 channels, found {tuple(shape)}.")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise DataError(f"{name}: expected an int >= 1, found {value!r}.")
    _check(interpolation, crop_pct, workers)
    if shape[0] == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    if randaugment is not None:
        RandAugment(randaugment, shape[1:], mean)  # a wrong notation should not wait until the data are read
    return ImageData(
        open_source(source),
        shape,
        tuple(mean),
        tuple(std),
        batch_size,
        limit,
        seed,
        flip,
        interpolation,
        crop_pct,
        randaugment,
        workers,
    )


def _check(interpolation: str, crop_pct: float, workers: int | None) -> None:
    if interpolation not in INTERPOLATIONS:
        raise DataError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, found {interpolation!r}.")
    if not 0 < crop_pct <= 1:
        raise DataError(f"crop_pct: expected a number in (0, 1], found {crop_pct!r}.")
    if workers is not None and workers < 0:
        raise DataError(f"workers: expected an int >= 0, found {workers!r}.")
