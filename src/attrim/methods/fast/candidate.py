"""One candidate: the cut network, its batch norms measured step by step, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attrim.methods.fast.boundary import Boundary
from attrim.methods.fast.folding import folded
from attrim.methods.fast.recording import Key
from attrim.methods.fast.resume import Kept, keeping, resuming
from attrim.modules.batches import Batch, run_batch
from attrim.recover.moments import Moments

__all__ = ["Candidate", "Keep", "Values"]

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
        calibration: Sequence[Mapping[Key, Any]],
        held: Sequence[Mapping[Key, Any]],
        pairs: Sequence[tuple[str, str]],
    ) -> None:
        self.network, self.where, self.pairs = network.eval(), where, pairs
        self._calibration, self._held = calibration, held
        self.norms: dict[str, Any] = {
            path: module
            for path, module in network.named_modules()
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

    @torch.no_grad()
    def values(
        self, batches: Sequence[Batch], begin: int, end: int, value: Values, keep: Keep | None = None
    ) -> list[Tensor]:
        """Values of the samples of ``batches[begin:end]``, a tensor for each batch."""
        with folded(self.network, self.pairs):
            return [
                value(self._run(batches[number], self._held, number, keep), batches[number])
                for number in range(begin, end)
            ]

    def _run(self, batch: Batch, stored: Sequence[Mapping[Key, Any]], number: int, keep: Keep | None) -> Any:
        if keep is not None:
            with keeping(self.network, keep.wanted, keep.shapes, keep.fragile, self.where, keep.into(number)):
                return self._resumed(batch, stored, number)
        return self._resumed(batch, stored, number)

    def _resumed(self, batch: Batch, stored: Sequence[Mapping[Key, Any]], number: int) -> Any:
        if self.where is None:
            return run_batch(self.network, batch)
        with resuming(self.network, self.where, stored[number]):
            return run_batch(self.network, batch)


class Keep:
    """Which outputs to keep, and where they go: one dict for each batch."""

    def __init__(self, wanted: frozenset[Key], shapes: frozenset[Key], fragile: frozenset[Key], batches: int) -> None:
        self.wanted, self.shapes, self.fragile = wanted, shapes, fragile
        self.kept: list[Kept] = [{} for _ in range(batches)]

    def into(self, batch: int) -> Kept:
        """The dict of one batch."""
        return self.kept[batch]
