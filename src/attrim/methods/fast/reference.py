"""The network whose activations are kept: candidates that agree with it up to some layer begin there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from attrim.methods.fast.boundary import Boundary, boundary, changed_later
from attrim.methods.fast.candidate import Keep
from attrim.methods.fast.recording import Key, Recording
from attrim.methods.fast.resume import Kept, Outputs
from attrim.search.space import Point

__all__ = ["Keeping", "Layout", "Origin", "Places", "Reference"]


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
        return len(self.boundaries) if at is None else self.before(at)

    def before(self, at: int) -> int:
        """How many boundaries lie at or before an operator."""
        return int(np.searchsorted([b.at for b in self.boundaries], at, side="right"))

    def saved(self, depth: int) -> float:
        """Share of a run that a candidate saves by beginning at the last of so many boundaries."""
        return self.work[depth - 1] if depth else 0.0


class Places:
    """All places where a run could be taken up: before the first use of each group.

    Args:
        recording: a run of a few samples.
        first: group -> the first operator that its width changes.
        samples: in the recorded run.

    Attributes:
        boundaries: ascending.
        first, fragile: as in :class:`Layout`.
    """

    def __init__(self, recording: Recording, first: Sequence[int], samples: int) -> None:
        self._sizes = {call.key: call.nbytes / samples for call in recording.calls}
        self._work = recording.work()
        found = [boundary(recording, at) for at in sorted({at for at in first if 0 < at < len(recording.ops)})]
        self.boundaries = tuple(b for b in found if b.real and self._work[b.at] > 0)
        self.first, self.fragile = tuple(first), changed_later(recording)

    def drop(self, numbers: set[int]) -> None:
        """Leave some out for good."""
        self.boundaries = tuple(b for i, b in enumerate(self.boundaries) if i not in numbers)

    def share(self, at: int) -> float:
        """Share of a whole run that lies before an operator."""
        return self._work[at] / self._work[-1]

    def layout(self, memory: float, boundaries: Sequence[Boundary] | None = None, free: Collection[Key] = ()) -> Layout:
        """As many boundaries as fit into memory; those that save least for what they take are left out first.

        Args:
            memory: the most bytes that one sample's outputs may take.
            boundaries: ascending; None for all.
            free: outputs that are at hand anyway.
        """
        found = list(self.boundaries if boundaries is None else boundaries)

        def total(chosen: Sequence[Boundary]) -> float:
            return sum(self._sizes[key] for key in {key for b in chosen for key in b.real}.difference(free))

        while found and total(found) > memory:
            lost = [self._work[b.at] - (self._work[found[i - 1].at] if i else 0) for i, b in enumerate(found)]
            freed = [total(found) - total([*found[:i], *found[i + 1 :]]) for i in range(len(found))]
            del found[min(range(len(found)), key=lambda i: lost[i] / max(freed[i], 1e-9))]
        shares = tuple(self.share(b.at) for b in found)
        return Layout(tuple(found), shares, self.first, self.fragile, int(total(found)))


class Origin(Protocol):
    """What candidates begin from: a network's kept outputs at the boundaries of a layout, batch by batch."""

    point: Point
    layout: Layout
    calibration: Outputs
    held: Outputs


class Reference:
    """Kept outputs of one candidate at all boundaries."""

    def __init__(self, point: Point, layout: Layout, calibration: list[Kept], held: list[Kept]) -> None:
        self.point, self.layout = point, layout
        self.calibration: Outputs = calibration
        self.held: Outputs = held


class Keeping:
    """What a run of a candidate keeps, so that others can begin from it.

    Args:
        layout: where they can begin.
        depth: how many of these places lie before the one where the run itself begins.
        origin: what is known before that.
        calibration, held: how many batches there are; no calibration batches where nothing is calibrated.
    """

    def __init__(self, layout: Layout, depth: int, origin: Origin | None, calibration: int, held: int) -> None:
        self._layout = layout
        self.calibration = _keep(layout, depth, None if origin is None else origin.calibration, calibration)
        self.held = _keep(layout, depth, None if origin is None else origin.held, held)

    def reference(self, point: Point) -> Reference:
        """The candidate, after its run."""
        return Reference(point, self._layout, self.calibration.kept, self.held.kept)


def _keep(layout: Layout, depth: int, before: Outputs | None, batches: int) -> Keep:
    """What a run from the last of ``depth`` boundaries has to keep, beside what is known before it."""
    wanted = frozenset(key for b in layout.boundaries[depth:] for key in b.real)
    shapes = frozenset(key for b in layout.boundaries[depth:] for key in b.skipped) - wanted
    known = frozenset(key for b in layout.boundaries[:depth] for key in b.skipped)
    return Keep(wanted, shapes, layout.fragile, batches, known, before)
