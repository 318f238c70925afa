"""One candidate: the cut network, its batch norms measured step by step, and its answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attrim.methods.fast.boundary import Boundary
from attrim.methods.fast.folding import fold, folded
from attrim.methods.fast.recording import Key
from attrim.methods.fast.resume import Enough, Kept, Outputs, keeping, resuming
from attrim.methods.fast.values import all_outputs
from attrim.modules.batches import Batch, run_batch
from attrim.recover.moments import Moments

__all__ = ["Candidate", "Keep", "Values", "unlike"]

Values = Callable[[Any, Batch], Tensor]
"""``(outputs, batch) ->`` a value for each sample, shape ``(n,)``; larger is better."""


class Candidate:
    """A cut network that is calibrated and judged, from a boundary on where there is one.

    Args:
        network: the cut network; used up.
        where: the boundary from which it differs from the reference, None to run it whole.
        calibration, held: kept outputs of the reference at the boundary, one dict per batch, where there is a boundary.
        pairs: convolutions and batch norms to fold in evaluations.

    Attributes:
        norms: batch norms with running statistics.
        calibrated: how many batches they have seen.
        seen: values of the samples that were judged when the candidate was given up.
    """

    def __init__(
        self,
        network: nn.Module,
        where: Boundary | None,
        calibration: Outputs,
        held: Outputs,
        pairs: Sequence[tuple[str, str]],
    ) -> None:
        self.network, self.where, self.pairs = network.eval(), where, pairs
        self._calibration, self._held = calibration, held
        self._modules = dict(network.named_modules())
        self.norms: dict[str, Any] = {
            path: module
            for path, module in self._modules.items()
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
        }
        for norm in self.norms.values():
            norm.reset_running_stats()
            norm.momentum = 1.0
        self._moments = Moments(self.norms)
        self.calibrated = 0
        self.seen = torch.empty(0)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Batch], upto: int, keep: Keep | None = None) -> None:
        """Measure the batch norms on ``batches[:upto]``, going on where the last call ended."""
        if not self.norms:
            return
        for norm in self.norms.values():
            norm.train()
        with self._moments.watching():
            for number in range(self.calibrated, upto):
                self._run(batches[number], self._calibration, number, keep)
                self._moments.add()
        self.calibrated = upto
        for norm in self.norms.values():
            norm.eval()
        self._moments.write()

    def values(self, batches: Sequence[Batch], value: Values, keep: Keep | None = None) -> Generator[Tensor]:
        """Values of the samples, batch after batch: whoever has seen enough closes the iterator."""
        with folded(self.network, self.pairs):
            for number, batch in enumerate(batches):
                with torch.no_grad():
                    found = value(self._run(batch, self._held, number, keep), batch)
                yield found

    def fold(self) -> None:
        """Fold the batch norms for good, for :meth:`run_held`."""
        fold(self.network, self.pairs, [], [])

    @torch.no_grad()
    def run_held(self, batch: Batch, number: int, keep: Keep) -> None:
        """Run one held-out batch for what is kept of it."""
        self._run(batch, self._held, number, keep)

    def _run(self, batch: Batch, stored: Outputs, number: int, keep: Keep | None) -> Any:
        if keep is None:
            return self._resumed(batch, stored, number)
        into = keep.into(number)
        try:
            with keeping(self._modules, keep.wanted, keep.shapes, keep.fragile, self.where, into, keep.enough):
                return self._resumed(batch, stored, number)
        except Enough:
            return None

    def _resumed(self, batch: Batch, stored: Outputs, number: int) -> Any:
        if self.where is None:
            return run_batch(self.network, batch)
        with resuming(self._modules, self.where, stored[number]):
            return run_batch(self.network, batch)


def unlike(whole: Candidate, boundaries: Sequence[Boundary], fragile: frozenset[Key], batch: Batch) -> set[int]:
    """Numbers of the boundaries from which a network does not give what it gives as a whole.

    Args:
        whole: a candidate that is run from its beginning.
        boundaries: to be tried.
        fragile: calls whose outputs change in place after they were given.
        batch: what it is tried on.
    """
    real = frozenset(key for b in boundaries for key in b.real)
    shapes = frozenset(key for b in boundaries for key in b.skipped) - real
    keep = Keep(real, shapes, fragile, 1)
    expected = torch.cat(list(whole.values([batch], all_outputs, keep)))
    wrong = set()
    for number, where in enumerate(boundaries):
        resumed = copy.copy(whole)
        resumed.where, resumed._held = where, keep.kept
        try:
            found = torch.cat(list(resumed.values([batch], all_outputs)))
        except (RuntimeError, ValueError, TypeError, IndexError):
            wrong.add(number)
            continue
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
            wrong.add(number)
    return wrong


class Keep:
    """Which outputs to keep, and where they go: one dict for each batch.

    Args:
        wanted, shapes, fragile: as in :func:`~attrim.methods.fast.resume.keeping`.
        batches: how many.
        known: outputs that are taken over from ``before``, batch by batch, when a batch is run.
        before: what a run begins with, or None.
        enough: whether a run ends once everything is kept.
    """

    def __init__(
        self,
        wanted: frozenset[Key],
        shapes: frozenset[Key],
        fragile: frozenset[Key],
        batches: int,
        known: frozenset[Key] = frozenset(),
        before: Outputs | None = None,
        enough: bool = False,
    ) -> None:
        self.wanted, self.shapes, self.fragile, self.enough = wanted, shapes, fragile, enough
        self.kept: list[Kept] = [{} for _ in range(batches)]
        self._known, self._before = known, before

    def into(self, batch: int) -> Kept:
        """The dict of one batch."""
        if self._before is not None and not self.kept[batch]:
            old = self._before[batch]
            self.kept[batch].update({key: old[key] for key in self._known if key in old})
        return self.kept[batch]
