"""Transforms from an image to pixels of a model's size: timm's where it is installed, torchvision's otherwise; RandAugment."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrim.errors import DataError, MissingDependencyError
from attrim.recover.pictures import in_channels
from attrim.recover.randomness import own_randomness

__all__ = ["INTERPOLATIONS", "PictureTransform", "RandAugment"]

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")

SMALLEST_CROP = 0.35
"""Random crops have at least this share of the area: milder than the 0.08 of training from nothing."""

_NOTATION = re.compile(r"rand(-(m|n|mmax)\d+|-(p|mstd)\d*\.?\d+|-inc[01]|-t\w+)*")


class RandAugment:
    """timm's RandAugment on one image or on a batch of bytes (Cubuk et al., 2020, arXiv:1909.13719).

    Args:
        config: timm's notation: ``rand-m9-mstd0.5`` is magnitude 9 with a deviation of 0.5, two operations an image.
        size: ``(height, width)`` of the images; bounds shifts.
        mean: per channel, of images in [0, 1]; fills what a shift or turn uncovers.

    Raises:
        MissingDependencyError: timm is not installed.
        DataError: timm does not understand ``config``.

    Example:
        >>> RandAugment("rand-m9-mstd0.5", (224, 224), IMAGENET_MEAN)(picture)
    """

    def __init__(self, config: str, size: tuple[int, int], mean: Sequence[float]) -> None:
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ImportError as error:
            raise MissingDependencyError("timm", "train", f"randaugment='{config}'") from error
        fill = tuple(min(255, round(255 * value)) for value in mean)
        settings = {"translate_const": int(min(size) * 0.45), "img_mean": fill if len(fill) == 3 else fill * 3}
        wrong = DataError(f"randaugment: expected timm's notation, for example 'rand-m9-mstd0.5', found {config!r}.")
        if not _NOTATION.fullmatch(config):  # timm passes over what it does not know
            raise wrong
        try:
            self._apply: Callable[[Any], Any] = rand_augment_transform(config, settings)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise wrong from error

    def __call__(self, picture: Any) -> Any:
        """An image of mode ``L`` or ``RGB``, changed; it keeps its mode and size. Draws from the global generators."""
        if picture.mode == "RGB":
            return self._apply(picture)
        return self._apply(picture.convert("RGB")).convert(picture.mode)

    def batch(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Every image of a batch, changed.

        Args:
            images: uint8, shape ``(N, C, H, W)`` with one channel or three.
            random: decides everything; the global generators are left as they were.

        Returns:
            uint8, shape ``(N, C, H, W)``.
        """
        from PIL import Image

        seed = int(torch.randint(2**62, (), generator=random))
        grey = images.shape[1] == 1
        arrays = (images[:, 0] if grey else images.permute(0, 2, 3, 1)).contiguous().numpy()
        with own_randomness(seed, torch.device("cpu")):
            changed = torch.from_numpy(np.stack([np.asarray(self(Image.fromarray(array))) for array in arrays]))
        return changed[:, None] if grey else changed.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class PictureTransform:
    """Makes pixels of a model's size of one image.

    For training: a random crop of 35-100 % of the area, resized; a mirror image half of the time; RandAugment if asked.
    Otherwise: the shorter side resized to ``size / crop_pct``, the middle cut out. timm's ``create_transform`` does
    both, or torchvision the same where timm is not installed; the global generators decide.

    Args:
        size: ``(height, width)`` that the model takes.
        channels: 1 or 3.
        train: whether to augment.
        flip: whether augmenting mirrors.
        interpolation: one of :data:`INTERPOLATIONS`.
        crop_pct: share of the resized side that the middle crop keeps, in (0, 1]; for plain images.
        randaugment: for augmented images; None for none.

    Raises:
        MissingDependencyError: torchvision is not installed.

    Example:
        >>> PictureTransform((224, 224), 3)(Image.open("cat.jpg")).shape
        torch.Size([3, 224, 224])
    """

    size: tuple[int, int]
    channels: int
    train: bool = False
    flip: bool = True
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    randaugment: RandAugment | None = None
    _steps: list[Callable[[Any], Any]] = field(init=False)

    def __post_init__(self) -> None:
        try:
            steps = _timm_steps(self)
        except ImportError:
            steps = _torchvision_steps(self)
        object.__setattr__(self, "_steps", steps)

    def __call__(self, picture: Any) -> Tensor:
        """uint8 of shape ``(channels, height, width)`` from a ``PIL.Image`` of any mode and size."""
        value: Any = in_channels(picture, self.channels)
        for step in self._steps:
            value = step(value)
        result: Tensor = value
        return result


def _timm_steps(asked: PictureTransform) -> list[Callable[[Any], Any]]:
    from timm.data.transforms_factory import create_transform

    common: dict[str, Any] = {
        "input_size": asked.size,
        "interpolation": asked.interpolation,
        "normalize": False,  # bytes are a quarter of what workers have to hand over
    }
    if not asked.train:
        return [create_transform(**common, is_training=False, crop_pct=asked.crop_pct)]
    training: dict[str, Any] = {
        "scale": (SMALLEST_CROP, 1.0),
        "hflip": 0.5 if asked.flip else 0.0,
        "color_jitter": None,
    }
    crop, _, last = create_transform(**common, **training, is_training=True, separate=True)
    return [crop, last] if asked.randaugment is None else [crop, asked.randaugment, last]


def _torchvision_steps(asked: PictureTransform) -> list[Callable[[Any], Any]]:
    try:
        from torchvision.transforms import InterpolationMode, v2
    except ImportError as error:
        raise MissingDependencyError("torchvision", "models", "transforming images larger than 64 x 64") from error
    interpolation = InterpolationMode(asked.interpolation)
    last = [v2.PILToTensor()]
    if not asked.train:
        height, width = (math.floor(side / asked.crop_pct) for side in asked.size)
        return [_Cover(height, width, v2, interpolation), v2.CenterCrop(asked.size), *last]
    first = [v2.RandomResizedCrop(asked.size, scale=(SMALLEST_CROP, 1.0), interpolation=interpolation)]
    first += [v2.RandomHorizontalFlip()] if asked.flip else []
    return [*first, *([asked.randaugment] if asked.randaugment else []), *last]


class _Cover:
    """Resizes an image, its proportions kept, to the smallest that covers ``height`` and ``width``."""

    def __init__(self, height: int, width: int, transforms: Any, interpolation: Any) -> None:
        self.height, self.width, self.resize, self.interpolation = (
            height,
            width,
            transforms.functional.resize,
            interpolation,
        )

    def __call__(self, picture: Any) -> Any:
        width, height = picture.size
        if self.height == self.width:  # as torchvision rounds
            size = [self.height]
        else:
            ratio = min(height / self.height, width / self.width)
            size = [round(height / ratio), round(width / ratio)]
        return self.resize(picture, size, interpolation=self.interpolation)
