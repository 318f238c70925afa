"""What candidates begin from: the reference, which follows the search, and the trunks of those that come together."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence

from attrim.errors import AttrimWarning
from attrim.methods.fast.candidate import Candidate, Values, unlike
from attrim.methods.fast.cutter import Cutter
from attrim.methods.fast.folding import foldable
from attrim.methods.fast.heldout import HeldOut
from attrim.methods.fast.recording import Recording
from attrim.methods.fast.reference import Keeping, Layout, Origin, Places, Reference
from attrim.methods.fast.trunk import Family, Trunk, families, with_places_of
from attrim.modules.batches import Batch
from attrim.search.space import Point

__all__ = ["Origins"]


class Origins:
    """Begins candidates as late in the network as something known allows.

    Args:
        cutter: makes their networks.
        recording: a run of a few samples of the whole network.
        samples: in that run.
        calibration, held: the batches that all candidates run on.
        values: what counts, for runs that only fill the reference.
        memory: bytes that all kept activations together may take.

    Attributes:
        layout: where a reference's activations are kept.
        work: what was run so far, in runs of a whole network.
    """

    def __init__(
        self,
        cutter: Cutter,
        recording: Recording,
        samples: int,
        calibration: Sequence[Batch],
        held: HeldOut,
        values: Values,
        memory: int,
    ) -> None:
        self._cutter, self._calibration, self._held, self._values = cutter, calibration, held, values
        self._pairs = foldable(cutter.model, recording)
        use, channels = recording.first_use(cutter.model), cutter.channels
        first = [min(use[m.axis.tensor] for m in channels[g].members) for g in channels.cost.groups]
        self._places = Places(recording, first, samples)
        # For the reference, the next one, one in the making, and a trunk.
        self._share = memory / 4 / (sum(b.size for b in calibration) + held.samples)
        self.layout: Layout = self._places.layout(self._share)
        self._checked = False
        self._reference: Reference | None = None
        self._ready: tuple[Reference, float] | None = None
        self._families: dict[Point, Family] = {}
        self._trunk: Trunk | None = None
        self.work = 0.0

    def forget(self) -> None:
        """The held-out samples lie in another order: nothing that was kept is of use."""
        self._reference, self._ready, self._families, self._trunk = None, None, {}, None

    def expect(self, points: Sequence[Point], best: Point | None) -> list[Point]:
        """The candidates that come next, in an order in which those that share most come one after the other."""
        # Without a reference, the differences from the best candidate show what is shared.
        middle = best if self._reference is None else self._reference.point
        found = families(self._places, middle, points) if middle is not None else []
        self._families = {point: family for family in found for point in family.members}
        self._trunk = None
        alone = [(point,) for point in points if point not in self._families]
        parts: list[tuple[Point, ...]] = [*(family.members for family in found), *alone]
        return [point for part in random.sample(parts, len(parts)) for point in part]

    def begin(self, point: Point) -> tuple[Candidate, Keeping | None]:
        """A candidate that is to be judged, and what its run keeps."""
        origin = self._origin(point)
        candidate, depth = self._candidate(point, origin)
        self.work += 1 - _saved(origin, depth)
        return candidate, self._keeping(candidate, origin) if self._checked and self.layout.boundaries else None

    def half(self, point: Point, share: float) -> Candidate:
        """A candidate that begins half as deep as it could, and runs on this share of the calibration."""
        candidate, depth = self._candidate(point, self._reference, 0.5)
        self.work += (1 - _saved(self._reference, depth)) * share
        return candidate

    def offer(self, keeping: Keeping, point: Point, value: float, known: float) -> None:
        """What a candidate kept that was judged whole: it may be the next reference if it is better than all that is known."""
        if value > max(known, float("-inf") if self._ready is None else self._ready[1]):
            self._ready = keeping.reference(point), value

    def aim(self, points: Sequence[Point], known: Sequence[Point]) -> None:
        """Take another reference, one of those that are known, if it saves more work than it costs."""
        if not self.layout.boundaries:
            return
        now = self._reference
        at_hand = 0.0 if now is None else self._savings(now.point, points)
        gain, chosen = 0.0, None
        for point in known:
            extra = self._savings(point, points) - at_hand - self._price(point)
            if extra > gain:
                gain, chosen = extra, point
        if chosen is not None:
            self._families, self._trunk = {}, None
            self._build(chosen)

    def _origin(self, point: Point) -> Origin | None:
        """What a candidate shares most with: its family's trunk or the reference."""
        family, reference = self._families.get(point), self._reference
        if family is None:
            return reference
        if self._trunk is None or self._trunk.point != family.point:
            self._trunk = None  # frees its memory before there is another one
            if not self._checked:
                self._check(family.point)
            candidate, depth = self._candidate(family.point, reference)
            layout = with_places_of(self._places, self.layout, depth, family, self._share)
            self.work += layout.saved(len(layout.boundaries)) - _saved(reference, depth)
            self._trunk = Trunk(family, layout, candidate, depth, reference, self._calibration, self._held.batches)
        return self._trunk

    def _candidate(self, point: Point, origin: Origin | None, share: float = 1.0) -> tuple[Candidate, int]:
        """A candidate that begins at the last boundary before its first difference from the origin, or earlier."""
        network = self._cutter.network(point)
        if origin is None:
            return Candidate(network, None, [], [], self._pairs), 0
        depth = int(share * origin.layout.depth(origin.point, point))
        where = origin.layout.boundaries[depth - 1] if depth else None
        return Candidate(network, where, origin.calibration, origin.held, self._pairs), depth

    def _keeping(self, candidate: Candidate, origin: Origin | None) -> Keeping:
        calibrated = len(self._calibration) if candidate.norms else 0
        depth = 0 if candidate.where is None else self.layout.before(candidate.where.at)
        return Keeping(self.layout, depth, origin, calibrated, len(self._held.batches))

    def _price(self, point: Point) -> float:
        """What it costs to make a candidate the reference, in whole runs."""
        if self._ready is not None and self._ready[0].point == point:
            return 0.0
        now = self._reference
        return 1.0 if now is None else 1.0 - self.layout.saved(self.layout.depth(now.point, point))

    def _savings(self, reference: Point, points: Sequence[Point]) -> float:
        return sum(self.layout.saved(self.layout.depth(reference, point)) for point in points)

    def _build(self, point: Point) -> None:
        if self._ready is not None and self._ready[0].point == point:
            self._reference, self._ready = self._ready[0], None
            return
        if not self._checked:
            self._check(point)
        candidate, depth = self._candidate(point, self._reference)
        self.work += 1 - _saved(self._reference, depth)
        keeping = self._keeping(candidate, self._reference)
        candidate.calibrate(self._calibration, len(self._calibration), keeping.calibration)
        for _ in candidate.values(self._held.batches, self._values, keeping.held):
            pass
        self._reference = keeping.reference(point)

    def _check(self, point: Point) -> None:
        """Leave out the places from where a network does not give what it gives as a whole."""
        boundaries = self._places.boundaries
        whole, _ = self._candidate(point, None)
        whole.calibrate(self._calibration, 1)
        wrong = unlike(whole, boundaries, self._places.fragile, self._held.batches[0])
        if wrong:
            warnings.warn(
                f"{len(wrong)} of {len(boundaries)} places where evaluation could be taken up do not give what "
                "the whole network gives, and are not used: candidates are evaluated right, but slower.",
                AttrimWarning,
                stacklevel=2,
            )
            self._places.drop(wrong)
            self.layout = self._places.layout(self._share)
        self._checked = True


def _saved(origin: Origin | None, depth: int) -> float:
    return 0.0 if origin is None else origin.layout.saved(depth)
