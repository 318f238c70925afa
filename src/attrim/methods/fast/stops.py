"""When a candidate is given up: it can hardly beat the best one any more, judged on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from attrim.errors import InputError

__all__ = ["Doubt", "Lesson", "Stop", "lesson"]

_BINS = 32


@dataclass(frozen=True, slots=True)
class Stop:
    """A test for futility. Each image is judged by the candidate and by the best one so far.

    What was lost on the images so far is compared with what luck can still bring on the others: ``z`` standard deviations
    of the difference there, from how often earlier candidates and the best ones of their time disagreed on images of that
    kind. The images on which networks disagree come first, so that little is left to luck soon.

    Attributes:
        z: how sure one has to be; larger gives up later. At 2, about one in forty of the candidates that would have tied
            with the best one is lost.
        first: share of the calibration images on which a candidate is calibrated before its first look, in (0, 1].
        looks: share of the held-out images that is judged on that first calibration, in (0, 1).
    """

    z: float = 2.0
    first: float = 0.125
    looks: float = 0.25

    def __post_init__(self) -> None:
        if not (self.z > 0 and 0 < self.first <= 1 and 0 < self.looks < 1):
            raise InputError(
                f"stop: expected z > 0, first in (0, 1] and looks in (0, 1), found {self.z!r}, {self.first!r} and {self.looks!r}."
            )

    def hopeless(self, mine: Tensor, best: Tensor, doubt: Doubt, early: int = 0) -> bool:
        """Whether to give up.

        Args:
            mine: values of the first ``n`` samples, shape ``(n,)``.
            best: of the best candidate, of these samples at least, in the same order.
            doubt: how often candidates and best ones disagree.
            early: the number of all samples, where both sides come from the smaller calibration: a quarter of the
                variance on the samples that were seen is open still. 0 elsewhere, where ``best`` holds all samples.
        """
        n, whole = mine.numel(), early or best.numel()
        lead = float((mine.double() - best[:n].double()).sum())
        luck = doubt.variance(n, whole)
        if early:
            luck += (doubt.variance(0, whole) - luck) / 4
        return lead + self.z * sqrt(luck) < 0


Lesson = tuple[tuple[float, ...], tuple[int, ...]]
"""For each part of the order: squared differences to the best candidate of the time, and over how many samples."""


def lesson(mine: Tensor, best: Tensor) -> Lesson:
    """What a comparison teaches: values of the first samples, and those of the best candidate of all samples."""
    n, whole = mine.numel(), best.numel()
    bins = torch.arange(n) * _BINS // whole
    squares = (mine.double() - best[:n].double()).square().cpu()
    sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, squares)
    return tuple(sums.tolist()), tuple(torch.bincount(bins, minlength=_BINS).tolist())


class Doubt:
    """Mean squared difference between candidates and the best ones of their time, by the place of the sample in the order."""

    def __init__(self) -> None:
        self._sum = torch.full((_BINS,), 0.5, dtype=torch.float64)
        self._count = torch.ones(_BINS, dtype=torch.float64)

    def learn(self, found: Lesson) -> None:
        """Take in a comparison."""
        self._sum += torch.tensor(found[0], dtype=torch.float64)
        self._count += torch.tensor(found[1], dtype=torch.float64)

    def variance(self, n: int, whole: int) -> float:
        """Of the sum of differences over the samples from the ``n``-th on."""
        each = self._sum / self._count
        return float(each[torch.arange(n, whole) * _BINS // whole].sum()) if n < whole else 0.0
