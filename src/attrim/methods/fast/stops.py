"""When a candidate is given up: it can hardly beat the best one any more, judged on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from attrim.errors import InputError

__all__ = ["Doubt", "Lesson", "Stop", "lesson"]

_BINS = 32


@dataclass(frozen=True, slots=True)
class Stop:
    """A test for futility. Each image is judged by the candidate and by the best one so far.

    What was lost on the images so far is compared with what luck can still bring: ``z`` standard deviations of the
    difference on the other images, from how often earlier candidates and the best ones of their time disagreed on images of
    that kind. The images on which networks disagree come first, so that little is left to luck soon.

    A candidate is first looked at with its batch norms measured on few images, and compared with the best one measured on the
    same few, so that most of what these images do to both cancels. How much of it does not is learned from the candidates
    that were judged both ways; where it is more than candidates differ by, there is no such look. It ends when the candidate is given up, or
    when it looks as if that will not happen.

    Attributes:
        z: how sure one has to be; larger gives up later. At 1.65, about one in twenty of the candidates that would have tied
            with the best one is lost.
        first: share of the calibration images on which a candidate is calibrated before its first look, in (0, 1].
        looks: share of the held-out images that is judged at most on that first calibration, in (0, 1).
    """

    z: float = 1.65
    first: float = 0.125
    looks: float = 0.6

    def __post_init__(self) -> None:
        if not (self.z > 0 and 0 < self.first <= 1 and 0 < self.looks < 1):
            raise InputError(
                f"stop: expected z > 0, first in (0, 1] and looks in (0, 1), found {self.z!r}, {self.first!r} and {self.looks!r}."
            )

    def hopeless(self, mine: Tensor, best: Tensor, doubt: Doubt, whole: int, *, early: bool = False) -> bool:
        """Whether to give up.

        Args:
            mine: values of the first ``n`` samples, shape ``(n,)``.
            best: of the best candidate, of these samples at least, in the same order.
            doubt: how often candidates and best ones disagree.
            whole: how many samples there are.
            early: whether both come from the smaller calibration.
        """
        return _lead(mine, best) + self.z * sqrt(doubt.luck(len(mine), whole, early)) < 0

    def promising(self, mine: Tensor, best: Tensor, doubt: Doubt, whole: int) -> bool:
        """Whether an early look at as many samples as ``best`` has would hardly end in giving up, if things go on like this."""
        n, end = len(mine), len(best)
        seen, then = (doubt.variance(0, whole) - doubt.variance(k, whole) for k in (n, end))
        lead = _lead(mine, best) * then / max(seen, 1e-12)
        return n >= end / 8 and lead + self.z * sqrt(doubt.luck(end, whole, True)) >= 0


Lesson = tuple[tuple[float, ...], tuple[int, ...], tuple[float, int]]
"""For each part of the order: squared differences to the best candidate of the time, and over how many samples. Then squared
differences between what both calibrations say of the lead, and over how many samples."""


def lesson(mine: Tensor, best: Tensor, early: tuple[Tensor, Tensor] | None = None) -> Lesson:
    """What a comparison teaches.

    Args:
        mine: values of the first samples.
        best: of the best candidate, of all samples.
        early: of both, on the smaller calibration.
    """
    n, whole = mine.numel(), best.numel()
    bins = torch.arange(n) * _BINS // whole
    lead = (mine.double() - best[:n].double()).cpu()
    sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, lead.square())
    both = (0.0, 0)
    if early is not None:
        k = min(n, len(early[0]))
        both = float((early[0][:k].double() - early[1][:k].double() - lead[:k].to(early[0].device)).square().sum()), k
    return tuple(sums.tolist()), tuple(torch.bincount(bins, minlength=_BINS).tolist()), both


class Doubt:
    """How far candidates are from the best ones of their time, by the place of the sample, and early answers from final ones."""

    def __init__(self) -> None:
        self._sum = torch.full((_BINS,), 0.5, dtype=torch.float64)
        self._count = torch.ones(_BINS, dtype=torch.float64)
        self._square, self._early = 0.0, 0

    def learn(self, found: Lesson) -> None:
        """Take in a comparison."""
        self._sum += torch.tensor(found[0], dtype=torch.float64)
        self._count += torch.tensor(found[1], dtype=torch.float64)
        self._square, self._early = self._square + found[2][0], self._early + found[2][1]

    def variance(self, n: int, whole: int) -> float:
        """Of the sum of differences over the samples from the ``n``-th on."""
        each = self._sum / self._count
        return float(each[torch.arange(n, whole) * _BINS // whole].sum()) if n < whole else 0.0

    def tells_early(self, end: int, whole: int) -> bool:
        """Whether an early look at ``end`` samples can say anything: it is nearer to the final answers than candidates are to one
        another. Until that is known, it is looked at to learn it."""
        return not self._early or end * self._square / self._early < self.variance(0, whole) - self.variance(end, whole)

    def luck(self, n: int, whole: int, early: bool) -> float:
        """Variance of what is still open after ``n`` samples."""
        if not early:
            return self.variance(n, whole)
        return self.variance(n, whole) + n * self._square / self._early if self._early else inf


def _lead(mine: Tensor, best: Tensor) -> float:
    return float((mine.double() - best[: len(mine)].double()).sum())
