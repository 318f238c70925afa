"""Batches of small images from memory: decoded once, then cropped, flipped and normalised a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attrim.errors import DataError
from attrim.recover.pictures import in_channels

__all__ = ["Normalize", "TensorBatches", "crop_and_flip", "decode"]


class TensorBatches:
    """Iterable of ``(images, labels)`` over images in memory; every pass starts anew and is decided by seed and epoch.

    Args:
        images: shape ``(N, C, H, W)``, uint8.
        labels: shape ``(N,)``, int64.
        mean, std: per channel, of images in [0, 1].
        batch_size: the last batch may be shorter; it is dropped when shuffling, if there are others.
        size: ``(height, width)`` that the model takes; batches are resized to it (bilinear, antialiased).
        crop: pixels of padding before a random crop, 0 for none.
        flip: whether half of the images are mirrored left to right.
        shuffle: whether the order changes with each epoch.
        seed: of order, crops, flips and ``change``.
        change: what else is done to the bytes, after cropping and flipping, such as :meth:`RandAugment.batch
            <attrim.recover.transforms.RandAugment.batch>`: takes uint8 ``(B, C, H, W)`` and a generator, returns the
            same shape.

    Yields:
        float32 images ``(B, C, h, w)`` and int64 labels ``(B,)``.

    Example:
        >>> batches = TensorBatches(images, labels, mean=(0.5,), std=(0.5,), crop=4, flip=True, shuffle=True)
        >>> batches.set_epoch(3)
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 128,
        size: tuple[int, int] | None = None,
        crop: int = 0,
        flip: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise DataError(
                f"expected uint8 images of shape (N, C, H, W) and N labels, found {images.dtype} of shape "
                f"{tuple(images.shape)} and {len(labels)} labels."
            )
        self.images, self.labels = images, labels
        self.batch_size, self.size = batch_size, size
        self.crop, self.flip, self.shuffle, self.seed, self.epoch = crop, flip, shuffle, seed, 0
        self.change = change
        self._normalize = Normalize(mean, std, images.shape[1])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, crops and flips of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole = len(self.labels) // self.batch_size
        return whole if self.shuffle and whole else -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._pass(torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))

    def _pass(self, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count, generator=random) if self.shuffle else torch.arange(count)
        for chosen in torch.split(order, self.batch_size)[: len(self)]:
            yield self._prepare(self.images[chosen], random), self.labels[chosen]

    def _prepare(self, images: Tensor, random: torch.Generator) -> Tensor:
        if self.crop or self.flip:
            images = crop_and_flip(images, self.crop, self.flip, random)
        if self.change is not None:
            images = self.change(images, random)
        if self.size is not None and self.size != tuple(images.shape[-2:]):
            images = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True, align_corners=False)
        return self._normalize(images)


class Normalize:
    """Bytes to ``(x / 255 - mean) / std``, a batch at a time.

    Args:
        mean, std: one number or one per channel, of images in [0, 1].
        channels: of the images.

    Raises:
        DataError: there are too few or too many numbers, or a deviation is not above 0.

    Example:
        >>> Normalize((0.5,), (0.25,), 3)(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise DataError(
                    f"{name}: expected {channels} numbers, one per channel, found {len(values)}. "
                    f"For example --{name} {','.join(['0.5'] * channels)}."
                )
        if min(std) <= 0:
            raise DataError(f"std: expected numbers > 0, found {min(std)}.")
        spread = torch.tensor(std).expand(channels).view(1, -1, 1, 1)
        middle = torch.tensor(mean).expand(channels).view(1, -1, 1, 1)
        self._scale, self._shift = 1 / (255 * spread), -middle / spread

    def __call__(self, images: Tensor) -> Tensor:
        """float32 of shape ``(N, C, H, W)`` from uint8 or from float32 in [0, 255]."""
        return torch.addcmul(self._shift, images.float(), self._scale)


def crop_and_flip(images: Tensor, pad: int, flip: bool, random: torch.Generator) -> Tensor:
    """Each image padded with zeros, cropped at a random place to its old size, and mirrored half of the time.

    Args:
        images: shape ``(N, C, H, W)``, any dtype.
        pad: pixels added on each side before the crop.
        flip: whether to mirror at all.
        random: decides places and flips.

    Returns:
        Shape ``(N, C, H, W)``.

    Example:
        >>> crop_and_flip(images, 4, True, torch.Generator().manual_seed(0))
    """
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=random)
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    chosen = windows[torch.arange(count), :, top, left]
    if flip:
        mirrored = torch.rand(count, generator=random) < 0.5
        chosen = torch.where(mirrored[:, None, None, None], chosen.flip(3), chosen)
    return chosen


def decode(pictures: Iterable[Any], channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """PIL images as one tensor.

    Args:
        pictures: ``PIL.Image`` objects of any mode.
        channels: 1 (grey) or 3 (RGB).
        size: ``(width, height)``; images of another size are resized. None takes the size of the first.

    Returns:
        uint8, shape ``(N, channels, H, W)``.

    Raises:
        DataError: there is no image.
    """
    arrays = []
    for picture in pictures:
        size = size or picture.size
        plain = in_channels(picture, channels)
        arrays.append(np.asarray(plain if plain.size == size else plain.resize(size)))
    if not arrays:
        raise DataError("expected at least one image, found none.")
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if channels == 1 else stacked.permute(0, 3, 1, 2).contiguous()
