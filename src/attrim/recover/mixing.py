"""Mixup and CutMix: images of a batch mixed in pairs, with labels to match."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrim.errors import DataError, MissingDependencyError
from attrim.modules.batches import Batch

__all__ = ["Mixer"]


class Mixer:
    """Mixes the images of each batch with timm's ``Mixup`` (one ratio a batch, drawn from NumPy's global generator).

    Args:
        mixup, cutmix: alpha of the Beta distributions, 0 for none; with both, each batch gets one of them.
        label_smoothing: of the mixed labels.
        classes: outputs of the classifier.

    Raises:
        MissingDependencyError: timm is not installed.

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.

    Example:
        >>> mixed = Mixer(0.2, 1.0, 0.0, classes=10)(batch)
    """

    def __init__(self, mixup: float, cutmix: float, label_smoothing: float, classes: int) -> None:
        try:
            from timm.data import mixup as library
        except ImportError as error:
            raise MissingDependencyError("timm", "train", "mixup and cutmix") from error
        self.classes, self.smoothing = classes, label_smoothing
        make: Any = library.Mixup
        self._mix = make(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=classes)

    def __call__(self, batch: Batch) -> Batch:
        """The batch with mixed images and class probabilities ``(N, classes)`` for labels.

        Of an odd number of images the last is left as it is.

        Raises:
            DataError: the batch is not one tensor of images ``(N, C, H, W)`` with class indices ``(N,)``.
        """
        images, labels = _pair(batch)
        even = len(images) - len(images) % 2
        mixed, targets = images.clone(), self._plain(labels)
        if even:
            device = labels.device
            mixed[:even], soft = self._mix(mixed[:even].clone(), labels[:even])
            targets[:even] = soft.to(device=device, dtype=targets.dtype)
        if batch.args:
            return replace(batch, args=(mixed,), labels=targets)
        return replace(batch, kwargs=dict.fromkeys(batch.kwargs, mixed), labels=targets)

    def _plain(self, labels: Tensor) -> Tensor:
        sharp = F.one_hot(labels, self.classes).to(torch.float32)
        return sharp * (1 - self.smoothing) + self.smoothing / self.classes


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = [*batch.args, *batch.kwargs.values()]
    images, labels = inputs[0], batch.labels
    good = (
        len(inputs) == 1
        and isinstance(images, Tensor)
        and images.ndim == 4
        and images.is_floating_point()
        and isinstance(labels, Tensor)
        and labels.ndim == 1
        and not labels.is_floating_point()
    )
    if not good:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(
            "mixup and cutmix need one tensor of images (N, C, H, W) and class indices (N,) in every batch, found "
            f"{len(inputs)} input(s), the first {shape}, and labels {found}. Pass mixup=0, cutmix=0."
        )
    return images, labels
