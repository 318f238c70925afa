"""What several candidates have in common behind their first difference from the reference: run once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attrim.methods.fast.candidate import Candidate
from attrim.methods.fast.reference import Keeping, Layout, Origin, Places
from attrim.methods.fast.resume import Kept, Outputs
from attrim.modules.batches import Batch
from attrim.search.space import Point

__all__ = ["Family", "Trunk", "families", "with_places_of"]

_LEAST = 0.02
"""Share of a run that a trunk must save in all."""


@dataclass(frozen=True, slots=True)
class Family:
    """Candidates that agree with one another further than with the reference.

    Attributes:
        point: the trunk: the reference with the change that they share. It need not keep any budget.
        members: candidates.
        ends: for each member, the first operator at which it differs from the trunk; None if it never does.
    """

    point: Point
    members: tuple[Point, ...]
    ends: tuple[int | None, ...]


def families(places: Places, reference: Point, candidates: Sequence[Point]) -> list[Family]:
    """Candidates by the first change that they share, where running that once pays."""
    shared: dict[tuple[int, Point], list[Point]] = {}
    for point in dict.fromkeys(candidates):
        at = _difference(places.first, reference, point)
        if at is not None:
            trunk = tuple(
                mine if first == at else old for first, old, mine in zip(places.first, reference, point, strict=True)
            )
            shared.setdefault((at, trunk), []).append(point)
    found = []
    for (at, trunk), members in shared.items():
        ends = tuple(_difference(places.first, trunk, point) for point in members)
        gains = [1.0 if end is None else places.share(end) for end in ends]
        saves = sum(gains) - max(gains) - (len(members) - 1) * places.share(at)
        if saves > _LEAST:
            found.append(Family(trunk, tuple(members), ends))
    return found


def _difference(first: Sequence[int], a: Point, b: Point) -> int | None:
    return min((at for at, x, y in zip(first, a, b, strict=True) if x != y), default=None)


def with_places_of(places: Places, layout: Layout, depth: int, family: Family, memory: float) -> Layout:
    """The boundaries of a layout as far as a family's trunk runs, and those before each of its members' own changes.

    Args:
        places: all there are.
        layout: of the reference.
        depth: how many of its boundaries lie before the trunk's first change; they stay as they are.
        family: whose trunk it is.
        memory: the most bytes that the others may take of one sample, beside those of ``layout``.
    """
    ends = [end for end in family.ends if end is not None]
    last = float("inf") if None in family.ends else max(ends)
    begin = layout.boundaries[depth - 1].at if depth else -1
    common = [b for b in layout.boundaries[depth:] if b.at <= last]
    taken = {b.at for b in common}
    wanted = {max((b.at for b in places.boundaries if b.at <= end), default=-1) for end in ends}
    own = [b for b in places.boundaries if b.at in wanted and b.at > begin and b.at not in taken]
    at_hand = {key for b in layout.boundaries for key in b.real}
    own = list(places.layout(memory, own, at_hand).boundaries)
    chosen = [*layout.boundaries[:depth], *sorted([*common, *own], key=lambda b: b.at)]
    return places.layout(float("inf"), chosen)


class Trunk:
    """A family's trunk: its outputs, batch by batch, computed when the first member asks for them.

    Args:
        family: whose it is.
        layout: where members begin.
        candidate: the network that all of them agree with; it begins at the last of ``depth`` boundaries of ``layout``.
        depth: see there.
        origin: the reference.
        calibration, held: the batches.

    Attributes:
        point, layout, calibration, held: see :class:`~attrim.methods.fast.reference.Origin`.
    """

    def __init__(
        self,
        family: Family,
        layout: Layout,
        candidate: Candidate,
        depth: int,
        origin: Origin | None,
        calibration: Sequence[Batch],
        held: Sequence[Batch],
    ) -> None:
        self.point, self.layout = family.point, layout
        keeping = Keeping(layout, depth, origin, len(calibration) if candidate.norms else 0, len(held))
        keeping.calibration.enough = keeping.held.enough = True

        def calibrated(number: int) -> None:
            if candidate.calibrated <= number:
                candidate.calibrate(calibration, len(calibration), keeping.calibration)

        def judged(number: int) -> None:
            if number == 0:
                calibrated(len(calibration) - 1)
                candidate.fold()
            candidate.run_held(held[number], number, keeping.held)

        self.calibration: Outputs = _Lazy(keeping.calibration.kept, calibrated)
        self.held: Outputs = _Lazy(keeping.held.kept, judged)


class _Lazy:
    """Outputs that are computed in the order of the batches, when one of them is asked for."""

    def __init__(self, kept: list[Kept], compute: Callable[[int], None]) -> None:
        self._kept, self._compute, self._done = kept, compute, 0

    def __getitem__(self, number: int, /) -> Kept:
        for missing in range(self._done, number + 1):
            self._compute(missing)
            self._done = missing + 1
        return self._kept[number]
