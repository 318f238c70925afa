"""Batches of larger images: decoded and transformed while they are needed, by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attrim.errors import MissingDependencyError
from attrim.recover.sources import Rows

__all__ = ["PictureBatches"]


class PictureBatches:
    """Iterable of ``(images, labels)`` over a table of encoded images, with torchvision's usual transforms.

    Training images are cropped at random to 35-100 % of their area and resized; the others are resized to 8/7 of the
    size and cropped in the middle.

    Args:
        rows: the images and labels.
        size: ``(height, width)`` that the model takes.
        channels: 1 or 3.
        mean, std: per channel, of images in [0, 1].
        batch_size: images per batch.
        augment: training transforms instead of the plain ones.
        flip: whether augmenting mirrors half of the images.
        shuffle: whether the order changes with each epoch; a short last batch is dropped then.
        seed: of order and crops.
        workers: processes; None takes one per core, four at most.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        size: tuple[int, int],
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        augment: bool = False,
        flip: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.workers = min(4, os.cpu_count() or 1) if workers is None else workers
        self._samples = _Samples(rows, _transform(size, channels, mean, std, augment, flip))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and crops of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole = len(self.rows) // self.batch_size
        return whole if self.shuffle and whole else -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self._samples,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            drop_last=self.shuffle and len(self.rows) >= self.batch_size,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch),
        )
        yield from loader


class _Samples(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, rows: Rows, transform: Any) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.rows.picture(index)), int(self.rows.labels[index])


def _transform(
    size: tuple[int, int], channels: int, mean: Sequence[float], std: Sequence[float], augment: bool, flip: bool
) -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingDependencyError("torchvision", "models", "transforming images larger than 64 x 64") from error
    first = [v2.Grayscale() if channels == 1 else v2.RGB(), v2.ToImage()]
    if augment:
        middle = [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)]
        middle += [v2.RandomHorizontalFlip()] if flip else []
    else:
        middle = [v2.Resize([-(-side * 8 // 7) for side in size], antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*first, *middle, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])
