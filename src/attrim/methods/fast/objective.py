"""The objective of a ratio search, without doing anything twice."""

from __future__ import annotations

import copy
import warnings
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
from attrim.errors import AttrimWarning, DataError, InputError
from attrim.methods.fast.candidate import Candidate, Keep, Values, unlike
from attrim.methods.fast.folding import foldable
from attrim.methods.fast.heldout import HeldOut, batches_for, few, small_enough
from attrim.methods.fast.recording import record
from attrim.methods.fast.reference import Keeping, Layout, Reference, lay_out
from attrim.methods.fast.stops import Doubt, Stop, lesson
from attrim.methods.fast.values import Judged, given_up, top1, with_clearness
from attrim.modules.batches import Batch, batch_source, device_of, read_batch
from attrim.search.decide import plan_from_kept
from attrim.search.space import Point
from attrim.surgery.cut import apply

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
        memory: int = 3 << 30,
        channels_last: bool = True,
    ) -> None:
        self._model = copy.deepcopy(model).eval()
        self._channels, self._stop, self._values = channels, stop, values
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self._model.to(memory_format=torch.channels_last)
        self._orders = {
            group: values.argsort(descending=True, stable=True).tolist() for group, values in scores.values.items()
        }
        self._calibration = self._held(calibration, "calibration")
        held = self._held(holdout, "holdout")
        some = few(held[0])
        recording = record(self._model, some)
        self._holdout = HeldOut(small_enough(held, recording.widest() / some.size, device_of(self._model)))
        self._pairs = foldable(self._model, recording)
        use = recording.first_use(self._model)
        first = [min(use[m.axis.tensor] for m in channels[g].members) for g in channels.cost.groups]
        images = sum(b.size for b in self._calibration) + self._holdout.samples
        self._layout: Layout = lay_out(
            recording, first, some.size, images, memory // 3
        )  # two of them, and one in the making
        self._checked = self._sorted = False
        self._reference: Reference | None = None
        self._ready: tuple[Reference, float] | None = None
        self._known: dict[Point, Judged] = {}
        self._recent: deque[Point] = deque(maxlen=_RECENT)
        self._early: dict[Point, Tensor] = {}
        self._expected: set[Point] = set()
        self._answers: dict[Point, Tensor] = {}
        self._first: Point | None = None
        self._best: Point | None = None
        self._doubt = Doubt()
        self.work = 0.0

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
        self.expect(points)
        found = {point: self._known[point] for point in points if point in self._known}
        for point in points:
            if point not in found:
                found[point] = self.judge_one(point)
        self.learn(found)
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
            self._aim(list(self._recent))
        return self._judge(point, None if exact else self._best)

    def expect(self, candidates: Sequence[Kept]) -> None:
        """Say which candidates come next, so that the reference can be chosen for all of them; changes no value.

        Args:
            candidates: kept counts. One alone says nothing.

        Raises:
            InputError: counts that the network cannot keep.
        """
        points = [point for kept in candidates if (point := self._point(kept)) not in self._known]
        self._expected = set(points) if len(points) > 1 else set()
        if self._expected:
            self._sort()
            self._aim(points)

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

    def _point(self, kept: Kept) -> Point:
        return tuple(self._channels.cost.vector(kept).tolist())

    def _sort(self) -> None:
        """Put the samples that the first candidate is least sure of to the beginning."""
        if self._sorted or self._first is None:
            return
        self._holdout.sort(self._answered(self._first)[:, 1])
        self._sorted, self._early, self._reference, self._ready = True, {}, None, None

    def _answered(self, point: Point) -> Tensor:
        """A candidate's values in the order in which the samples came; it is judged whole if they are not at hand."""
        if point not in self._answers:
            self._judge(point, None)
        return self._answers[point]

    def _judge(self, point: Point, rival: Point | None) -> Judged:
        """Judge a candidate against another one, or alone."""
        best = None if rival is None else self._holdout.present(self._answered(rival))[:, 0]
        early: tuple[Tensor, Tensor] | None = None
        candidate, depth = self._candidate(point)
        keeping = self._keeping(candidate, depth) if self._checked and self._layout.boundaries else None
        keep = None if keeping is None else keeping.calibration
        self.work += 1 - self._layout.saved(depth)
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
        if keeping is not None and judged.value > self._bar():
            self._ready = keeping.reference(point), judged.value
        return judged

    def _bar(self) -> float:
        """The value above which a candidate may be the next reference."""
        known = [] if self._best is None else [self._known[self._best].value]
        return max([*known, *([] if self._ready is None else [self._ready[1]])], default=float("-inf"))

    def _keeping(self, candidate: Candidate, depth: int) -> Keeping:
        calibrated = len(self._calibration) if candidate.norms else 0
        return Keeping(self._layout, depth, self._reference, calibrated, len(self._holdout.batches))

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
            candidate, depth = self._candidate(rival, 0.5)
            candidate.calibrate(self._calibration, self._early_batches(candidate))
            values = candidate.values(self._early_look(), self._values)
            self._early = {rival: torch.cat([with_clearness(value)[:, 0] for value in values])}
            self.work += (1 - self._layout.saved(depth)) * (0.0 if self._stop is None else self._stop.first)
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

    def _candidate(self, point: Point, share: float = 1.0) -> tuple[Candidate, int]:
        """A candidate that begins at the last boundary before its first difference from the reference, or earlier."""
        reference = self._reference
        depth = 0 if reference is None else int(share * self._layout.depth(reference.point, point))
        where = self._layout.boundaries[depth - 1] if depth else None
        calibration = reference.calibration if reference is not None else []
        held = reference.held if reference is not None else []
        return Candidate(self._network(point), where, calibration, held, self._pairs), depth

    def _network(self, point: Point) -> nn.Module:
        groups, sizes = self._channels.cost.groups, self._channels.cost.sizes
        kept: dict[str, list[int]] = {}
        for group, count, size in zip(groups, point, sizes.tolist(), strict=True):
            if count == size:
                continue
            if group not in self._orders:
                raise InputError(f"group '{group}' has no scores, so it stays whole; found {count} of {size} channels.")
            kept[group] = sorted(self._orders[group][:count])
        network = apply(self._model, plan_from_kept(self._channels, kept), share=True)
        return network.to(memory_format=self._format)

    def _aim(self, points: Sequence[Point]) -> None:
        """Take another reference if it saves more work than it costs."""
        if not self._layout.boundaries:
            return
        now = self._reference
        at_hand = 0.0 if now is None else self._savings(now.point, points)
        gain, chosen = 0.0, None
        for known in (p for p, judged in self._known.items() if judged.complete):
            extra = self._savings(known, points) - at_hand - self._price(known)
            if extra > gain:
                gain, chosen = extra, known
        if chosen is not None:
            self._build(chosen)

    def _price(self, point: Point) -> float:
        """What it costs to make a candidate the reference, in whole runs."""
        if self._ready is not None and self._ready[0].point == point:
            return 0.0
        return 1.0 - (self._layout.saved(self._layout.depth(self._reference.point, point)) if self._reference else 0.0)

    def _savings(self, reference: Point, points: Sequence[Point]) -> float:
        return sum(self._layout.saved(self._layout.depth(reference, point)) for point in points)

    def _build(self, point: Point) -> None:
        if self._ready is not None and self._ready[0].point == point:
            self._reference, self._ready = self._ready[0], None
            return
        candidate, depth = self._candidate(point)
        self.work += 1 - self._layout.saved(depth)
        keeping = self._keeping(candidate, depth)
        candidate.calibrate(self._calibration, len(self._calibration), keeping.calibration)
        for _ in candidate.values(self._holdout.batches, self._values, keeping.held):
            pass
        self._reference = keeping.reference(point)
        if not self._checked:
            self._check(candidate)

    def _check(self, whole: Candidate) -> None:
        """Leave out the places from where the reference does not give the same."""
        if self._reference is None or whole.where is not None:
            return
        wrong = unlike(whole, self._layout.boundaries, self._holdout.batches[0], self._reference.held[0])
        if wrong:
            warnings.warn(
                f"{len(wrong)} of {len(self._layout.boundaries)} places where evaluation could be taken up do not give what "
                "the whole network gives, and are not used: candidates are evaluated right, but slower.",
                AttrimWarning,
                stacklevel=2,
            )
        self._layout = self._layout.without(wrong)
        self._checked = True

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
