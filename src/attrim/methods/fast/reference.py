"""The network whose activations are kept: candidates that agree with it up to some layer begin there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attrim.methods.fast.boundary import Boundary, boundary, changed_later
from attrim.methods.fast.candidate import Keep
from attrim.methods.fast.recording import Key, Recording
from attrim.methods.fast.resume import Kept
from attrim.search.space import Point

__all__ = ["Keeping", "Layout", "Reference", "lay_out"]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where a run can be taken up.

    Attributes:
        boundaries: ascending.
        work: share of a whole run that lies before each, in [0, 1).
        first: group, by position in the cost model, -> the first operator that its width changes.
        fragile: calls whose outputs change in place after they were given.
        nbytes: of everything that is kept, for one sample.
    """

    boundaries: tuple[Boundary, ...]
    work: tuple[float, ...]
    first: tuple[int, ...]
    fragile: frozenset[Key]
    nbytes: int

    def depth(self, a: Point, b: Point) -> int:
        """How many boundaries lie before the first difference between two candidates."""
        at = min((first for first, x, y in zip(self.first, a, b, strict=True) if x != y), default=None)
        if at is None:
            return len(self.boundaries)
        return int(np.searchsorted([b.at for b in self.boundaries], at, side="right"))

    def saved(self, depth: int) -> float:
        """Share of a run that a candidate saves by beginning at the last of so many boundaries."""
        return self.work[depth - 1] if depth else 0.0

    def without(self, dropped: set[int]) -> Layout:
        """The same without some boundaries."""
        stay = [i for i in range(len(self.boundaries)) if i not in dropped]
        return Layout(
            tuple(self.boundaries[i] for i in stay),
            tuple(self.work[i] for i in stay),
            self.first,
            self.fragile,
            self.nbytes,
        )


def lay_out(recording: Recording, first: Sequence[int], samples: int, all_samples: int, memory: int) -> Layout:
    """Boundaries before the first use of each group, as many as fit into memory.

    Args:
        recording: a run of a few samples.
        first: group -> the first operator that its width changes.
        samples: in the recorded run.
        all_samples: whose activations will be kept.
        memory: the most bytes that they may take.
    """
    sizes = {call.key: call.nbytes / samples for call in recording.calls}
    work = recording.work()
    found = [boundary(recording, at) for at in sorted({at for at in first if 0 < at < len(recording.ops)})]
    found = [b for b in found if b.real and work[b.at] > 0]

    def total(chosen: Sequence[Boundary]) -> float:
        return sum(sizes[key] for key in {key for b in chosen for key in b.real}) * all_samples

    while found and total(found) > memory:
        lost = [work[b.at] - (work[found[i - 1].at] if i else 0) for i, b in enumerate(found)]
        freed = [total(found) - total([*found[:i], *found[i + 1 :]]) for i in range(len(found))]
        del found[min(range(len(found)), key=lambda i: lost[i] / max(freed[i], 1e-9))]
    shares = tuple(work[b.at] / work[-1] for b in found)
    return Layout(tuple(found), shares, tuple(first), changed_later(recording), int(total(found) / max(1, all_samples)))


class Reference:
    """Kept outputs of one candidate at all boundaries."""

    def __init__(self, point: Point, calibration: list[Kept], held: list[Kept]) -> None:
        self.point, self.calibration, self.held = point, calibration, held


class Keeping:
    """What a run of a candidate keeps, so that it can become the reference.

    Args:
        layout: the boundaries.
        depth: of them, how many lie before the candidate's first difference from ``reference``.
        reference: what is known before it.
        calibration, held: how many batches there are; no calibration batches where nothing is calibrated.
    """

    def __init__(self, layout: Layout, depth: int, reference: Reference | None, calibration: int, held: int) -> None:
        self.calibration = _keep(layout, depth, None if reference is None else reference.calibration, calibration)
        self.held = _keep(layout, depth, None if reference is None else reference.held, held)

    def reference(self, point: Point) -> Reference:
        """The candidate, after its run."""
        return Reference(point, self.calibration.kept, self.held.kept)


def _keep(layout: Layout, depth: int, before: Sequence[Mapping[Key, object]] | None, batches: int) -> Keep:
    """What a run from the last of ``depth`` boundaries has to keep, filled with what is known before it."""
    wanted = frozenset(key for b in layout.boundaries[depth:] for key in b.real)
    shapes = frozenset(key for b in layout.boundaries[depth:] for key in b.skipped) - wanted
    keep = Keep(wanted, shapes, layout.fragile, batches)
    if before is not None and batches:
        known = {key for b in layout.boundaries[:depth] for key in b.skipped}
        for mine, old in zip(keep.kept, before, strict=True):
            mine.update({key: value for key, value in old.items() if key in known})
    return keep
