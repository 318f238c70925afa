"""The objective of a ratio search, without doing anything twice."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import DataError
from attrim.methods.fast.candidate import Candidate, Keep, Values
from attrim.methods.fast.cutter import Cutter
from attrim.methods.fast.heldout import HeldOut, batches_for, few, small_enough
from attrim.methods.fast.origins import Origins
from attrim.methods.fast.recording import record
from attrim.methods.fast.stops import Doubt, Stop, lesson
from attrim.methods.fast.values import Judged, given_up, top1, with_clearness
from attrim.modules.batches import Batch, batch_source, device_of, read_batch
from attrim.search.space import Point

__all__ = ["FastObjective"]

Kept = Point | Sequence[int] | Mapping[str, int]
"""Kept counts, by group or in the order of ``channels.cost.groups``."""

_RECENT = 8
"""Candidates that came one by one and are remembered, to see whether another reference would pay."""


class FastObjective:
    """Accuracy of a cut of ``model`` with recalibrated batch norms, for many cuts that resemble one another.

    The same as ``evaluate(recalibrate(apply(model, plan), calibration), holdout)``, to rounding, in less time:

    * a reference network's activations are kept at the inputs of the layers that the search varies, for calibration and
      held-out images alike; a candidate that agrees with it up to some layer is only run from there. The reference
      follows the search;
    * nothing is copied but what is cut, and batch-norm statistics; in evaluation, batch norms are folded into the
      convolutions before them, and images lie channels-last;
    * a candidate that can hardly beat the best one any more is given up (``stop``), the unclear images being looked at
      first; its value is then an estimate below the best value. The best of all candidates is always judged whole.

    What is the best so far, and how often candidates disagreed with it, changes only between calls of :meth:`judge`: the
    same calls give the same values. Those who share the work among processes, or go on with a killed run, use
    :meth:`judge_one`, which changes nothing, and :meth:`learn`, which takes in results wherever they come from.

    Args:
        model: the trained network. Not changed.
        channels: its map.
        scores: which channels of a group stay, for any number of them.
        calibration: training images, augmented as in training, for the batch norms; read once and held.
        holdout: labelled training images that nothing is trained on; read once and held. Never test images.
        values: ``(outputs, batch) ->`` what counts, for each sample, shape ``(n,)``, larger is better; or ``(n, 2)`` with
            how clear the case is beside it. :func:`top1` unless told otherwise.
        stop: when to give up; None judges every candidate whole.
        memory: bytes that all kept activations together may take; 0 keeps none.
        channels_last: whether images and weights are laid out that way, which most processors prefer.

    Raises:
        DataError: no batches, or no labels in ``holdout``.

    Example:
        >>> objective = FastObjective(model, channels, scores, calibration, holdout)
        >>> objective([16, 8, 12])                    # kept counts in the order of channels.cost.groups
        0.8125
    """

    def __init__(
        self,
        model: nn.Module,
        channels: ChannelMap,
        scores: Scores,
        calibration: Iterable[Any],
        holdout: Iterable[Any],
        *,
        values: Values = top1,
        stop: Stop | None = Stop(),  # noqa: B008  (frozen)
        memory: int = 4 << 30,
        channels_last: bool = True,
    ) -> None:
        self._model = copy.deepcopy(model).eval()
        self._channels, self._stop, self._values = channels, stop, values
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self._model.to(memory_format=torch.channels_last)
        self._calibration = self._held(calibration, "calibration")
        held = self._held(holdout, "holdout")
        some = few(held[0])
        recording = record(self._model, some)
        self._holdout = HeldOut(small_enough(held, recording.widest() / some.size, device_of(self._model)))
        cutter = Cutter(self._model, channels, scores, self._format)
        self._origins = Origins(cutter, recording, some.size, self._calibration, self._holdout, values, memory)
        self._sorted = False
        self._known: dict[Point, Judged] = {}
        self._recent: deque[Point] = deque(maxlen=_RECENT)
        self._early: dict[Point, Tensor] = {}
        self._expected: set[Point] = set()
        self._answers: dict[Point, Tensor] = {}
        self._first: Point | None = None
        self._best: Point | None = None
        self._doubt = Doubt()

    @property
    def work(self) -> float:
        """What was run so far, in runs of a whole network."""
        return self._origins.work

    @property
    def best(self) -> tuple[Point, float] | None:
        """The best candidate that was judged whole, and its value."""
        return None if self._best is None else (self._best, self._known[self._best].value)

    def __call__(self, kept: Kept) -> float:
        """The value of one candidate."""
        return self.judge([kept])[0].value

    def judge(self, candidates: Sequence[Kept]) -> list[Judged]:
        """Judge candidates, then learn from them; those that come together share a reference, if one pays.

        Args:
            candidates: kept counts, by group or in the order of ``channels.cost.groups``.

        Raises:
            InputError: counts that the network cannot keep.
        """
        points = [self._point(kept) for kept in candidates]
        found = {point: self._known[point] for point in points if point in self._known}
        for point in self.expect(points):
            found[point] = self.judge_one(point)
        self.learn({point: found[point] for point in points})
        return [found[point] for point in points]

    def judge_one(self, kept: Kept, *, exact: bool = False) -> Judged:
        """Judge one candidate against what was learned so far.

        Args:
            kept: kept counts.
            exact: judge it whole, whatever it is worth.

        Raises:
            InputError: counts that the network cannot keep.
        """
        point = self._point(kept)
        self._sort()
        self._recent.append(point)
        if point not in self._expected:
            self._origins.aim(list(self._recent), self._whole())
        return self._judge(point, None if exact else self._best)

    def expect(self, candidates: Sequence[Kept]) -> list[Point]:
        """Say which candidates come next, so that the reference can be chosen for all of them; changes no value.

        Args:
            candidates: kept counts. One alone says nothing.

        Returns:
            Those that are not known, in the order in which they are judged fastest: what some of them share behind the
            reference is run once, if they come one after the other. Several processes begin at different places.

        Raises:
            InputError: counts that the network cannot keep.
        """
        points = list(dict.fromkeys(p for kept in candidates if (p := self._point(kept)) not in self._known))
        self._expected = set(points) if len(points) > 1 else set()
        if self._expected:
            self._sort()
            self._origins.aim(points, self._whole())
        return self._origins.expect(points, self._best)

    def learn(self, found: Mapping[Point, Judged], eligible: Callable[[Point], bool] = lambda point: True) -> None:
        """Take in results, in their order, from here or elsewhere.

        Args:
            found: candidates and what is known about them; those that were learned before change nothing.
            eligible: whether a candidate may be the best one (it keeps the budget).
        """
        for point, judged in found.items():
            if point in self._known:
                continue
            self._known[point] = judged
            self._first = self._first or point
            if judged.lesson is not None:
                self._doubt.learn(judged.lesson)
            better = self._best is None or judged.value > self._known[self._best].value
            if judged.complete and eligible(point) and better:
                self._best = point

    def _whole(self) -> list[Point]:
        return [point for point, judged in self._known.items() if judged.complete]

    def _point(self, kept: Kept) -> Point:
        return tuple(self._channels.cost.vector(kept).tolist())

    def _sort(self) -> None:
        """Put the samples that the first candidate is least sure of to the beginning."""
        if self._sorted or self._first is None:
            return
        self._holdout.sort(self._answered(self._first)[:, 1])
        self._sorted, self._early = True, {}
        self._origins.forget()

    def _answered(self, point: Point) -> Tensor:
        """A candidate's values in the order in which the samples came; it is judged whole if they are not at hand."""
        if point not in self._answers:
            self._judge(point, None)
        return self._answers[point]

    def _judge(self, point: Point, rival: Point | None) -> Judged:
        """Judge a candidate against another one, or alone."""
        best = None if rival is None else self._holdout.present(self._answered(rival))[:, 0]
        early: tuple[Tensor, Tensor] | None = None
        candidate, keeping = self._origins.begin(point)
        keep = None if keeping is None else keeping.calibration
        if rival is not None and best is not None and self._early_batches(candidate) and self._early_tells():
            rivals = self._early_values(rival)
            mine = self._looked_at_early(candidate, rivals, keep)
            if mine is None:
                return given_up(candidate.seen, rivals, best, None)
            early = mine, rivals
        candidate.calibrate(self._calibration, len(self._calibration), keep)
        answers = self._values_of(candidate, best, None if keeping is None else keeping.held)
        if answers is None and best is not None:
            return given_up(candidate.seen, best, best, lesson(candidate.seen, best, early))
        if answers is None or not answers.numel():
            raise DataError("holdout: no label >= 0 in the batches, so there is nothing to compare with.")
        self._answers[point] = self._holdout.arrived(answers)
        learned = None if best is None else lesson(answers[:, 0], best, early)
        judged = Judged(float(answers[:, 0].double().mean()), True, len(answers), learned)
        if keeping is not None:
            known = float("-inf") if self._best is None else self._known[self._best].value
            self._origins.offer(keeping, point, judged.value, known)
        return judged

    def _early_batches(self, candidate: Candidate) -> int:
        """Calibration batches before the first look; 0 where there is none."""
        if self._stop is None or not candidate.norms:
            return 0
        first = max(1, round(self._stop.first * len(self._calibration)))
        return first if first < len(self._calibration) else 0

    def _early_values(self, rival: Point) -> Tensor:
        """What the best candidate answers on the smaller calibration.

        Only in its second half: that is how much of a candidate is calibrated anew on average, and what the few images do
        to both should be the same.
        """
        if rival not in self._early:
            first = 0.0 if self._stop is None else self._stop.first
            candidate = self._origins.half(rival, first)
            candidate.calibrate(self._calibration, self._early_batches(candidate))
            values = candidate.values(self._early_look(), self._values)
            self._early = {rival: torch.cat([with_clearness(value)[:, 0] for value in values])}
        return self._early[rival]

    def _early_tells(self) -> bool:
        end = sum(batch.size for batch in self._early_look())
        return self._doubt.tells_early(end, self._holdout.samples)

    def _early_look(self) -> list[Batch]:
        share = 1.0 if self._stop is None else self._stop.looks
        return self._holdout.batches[: batches_for(self._holdout.batches, share * self._holdout.samples)]

    def _looked_at_early(self, candidate: Candidate, rival: Tensor, keep: Keep | None) -> Tensor | None:
        """Values of the first samples on the smaller calibration; None once the candidate is to be given up."""
        candidate.calibrate(self._calibration, self._early_batches(candidate), keep)
        found: list[Tensor] = []
        with closing(candidate.values(self._early_look(), self._values)) as values:
            for value in values:
                found.append(with_clearness(value)[:, 0])
                mine = torch.cat(found)
                if self._stop is None or self._stop.promising(mine, rival, self._doubt, self._holdout.samples):
                    break
                if self._stop.hopeless(mine, rival, self._doubt, self._holdout.samples, early=True):
                    candidate.seen = mine
                    return None
        return torch.cat(found)

    def _values_of(self, candidate: Candidate, best: Tensor | None, keep: Keep | None) -> Tensor | None:
        """Values of all samples, batch by batch; None once the candidate is to be given up."""
        found: list[Tensor] = []
        batches = self._holdout.batches
        with closing(candidate.values(batches, self._values, keep)) as values:
            for value in values:
                found.append(with_clearness(value))
                if self._stop is None or best is None or len(found) == len(batches):
                    continue
                mine = torch.cat(found)[:, 0]
                if self._stop.hopeless(mine, best, self._doubt, len(best)):
                    candidate.seen = mine
                    return None
        return torch.cat(found)

    def _held(self, batches: Iterable[Any], name: str) -> list[Batch]:
        device = device_of(self._model)
        found = [self._laid_out(read_batch(raw, device)) for raw in batch_source(batches)]
        if not found:
            raise DataError(f"{name}: no batch: the source is empty, or a generator that was used up before.")
        return found

    def _laid_out(self, batch: Batch) -> Batch:
        def laid(tensor: Tensor) -> Tensor:
            return tensor.contiguous(memory_format=self._format) if tensor.ndim == 4 else tensor

        args, kwargs = tree_map_only(Tensor, laid, (batch.args, dict(batch.kwargs)))
        return replace(batch, args=args, kwargs=kwargs, raw=None)
