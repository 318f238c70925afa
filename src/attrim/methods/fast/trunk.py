"""What several candidates have in common behind their first difference from the reference: run once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from attrim.methods.fast.candidate import Candidate
from attrim.methods.fast.reference import Keeping, Layout, Origin, Places
from attrim.methods.fast.resume import Kept
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
        saves: of runs, what they need not do twice.
    """

    point: Point
    members: tuple[Point, ...]
    ends: tuple[int | None, ...]
    saves: float


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
            found.append(Family(trunk, tuple(members), ends, saves))
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
        folded = False

        def calibrated(number: int) -> None:
            if candidate.calibrated < len(calibration):
                candidate.calibrate(calibration, len(calibration), keeping.calibration)

        def judged(number: int) -> None:
            nonlocal folded
            if not folded:
                calibrated(0)
                candidate.fold()
                folded = True
            candidate.run_held(held[number], number, keeping.held)

        self.calibration: Sequence[Kept] = _Lazy(keeping.calibration.kept, calibrated, whole=True)
        self.held: Sequence[Kept] = _Lazy(keeping.held.kept, judged)


class _Lazy(Sequence[Kept]):
    """Outputs that are computed in their order, when one of them is asked for."""

    def __init__(self, kept: list[Kept], more: Callable[[int], None], whole: bool = False) -> None:
        self._kept, self._more, self._whole, self._done = kept, more, whole, 0

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, number: int) -> Kept: ...
    @overload
    def __getitem__(self, number: slice) -> list[Kept]: ...
    def __getitem__(self, number: int | slice) -> Kept | list[Kept]:
        last = range(len(self._kept))[number]
        while self._done <= (last if isinstance(last, int) else max(last, default=-1)):
            self._more(self._done)
            self._done = len(self._kept) if self._whole else self._done + 1
        return self._kept[number]
