"""How good the network of a plan is before any training, on data that the weights have not learned from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.plan import PruningPlan, write_atomic
from attrim.errors import CheckpointError
from attrim.methods.dcpa.stage2 import measures
from attrim.modules.batches import device_of, run_batch
from attrim.modules.distributed import all_sum, rank, world
from attrim.recover.evaluate import restore_modes
from attrim.recover.feed import Feed, Portion
from attrim.recover.keeper import weights_digest
from attrim.recover.metrics import class_hits
from attrim.recover.objective import Objective
from attrim.recover.randomness import own_randomness
from attrim.recover.recalibrate import recalibrate
from attrim.recover.recipe import Loss, Recipe
from attrim.surgery.cut import apply

__all__ = ["Judge", "Verdict"]

_JUDGED = 100
"""Batches on which a network is judged, at most."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mean loss (infinite where it is no number), and top-1 accuracy in [0, 1], None where labels are not classes."""

    loss: float
    accuracy: float | None


@dataclass(slots=True, eq=False)
class Judge:
    """Judges plans: the network is cut, its batch-norm statistics are measured, and its loss is read in eval mode.

    Every plan is judged on the same batches, at most 100, which all processes share.

    Attributes:
        base: the network to cut. Not changed.
        source: batches for batch-norm statistics.
        heldout: batches to judge on, with a length.
        loss: ``(outputs, batch) -> scalar`` instead of cross entropy.
        limit: batches for the statistics; 0 measures none.
        seed: of whatever is random about the batches.
        file: where decisions are kept and found again; None keeps none.

    Example:
        >>> Judge(base, train, heldout, None)(plan).accuracy
        0.78
    """

    base: nn.Module
    source: Iterable[Any]
    heldout: Iterable[Any]
    loss: Loss | None
    limit: int = 100
    seed: int = 0
    file: Path | None = None
    _began: list[Tensor] | None = field(default=None, init=False)
    _known: dict[str, Any] | None = field(default=None, init=False)

    def __call__(self, plan: PruningPlan) -> Verdict:
        """The verdict on one plan, the same in all processes."""
        device = device_of(self.base)
        with own_randomness(self.seed % 2**63, device):
            small = apply(self.base, plan, share=True)
            if self.limit and any(measures(module) for module in small.modules()):
                small = recalibrate(small, self.source, limit=self.limit)
            feed = Feed(self.heldout, seed=self.seed, device=device, rank=rank(), world=world())
            self._began = feed.states() if self._began is None else self._began
            sums = self._sums(small, islice(feed.epoch(0, 0, self._began), _JUDGED))
        loss, samples, right, judged = sums.tolist()
        mean = loss / max(1.0, samples)
        return Verdict(mean if math.isfinite(mean) else math.inf, right / judged if judged else None)

    def known(self) -> dict[str, Any]:
        """Decisions that were made by its verdicts, in this run or in the earlier one whose folder ``file`` lies in.

        Read once, so that processes agree on what is known while one of them writes.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if self._known is None:
            self._known = {}
            if self.file is not None and self.file.is_file():
                try:
                    self._known = dict(json.loads(self.file.read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError) as error:
                    raise CheckpointError(
                        f"'{self.file}' is damaged: {error}. Delete it, and the networks are judged once more."
                    ) from error
        return self._known

    def keep(self) -> None:
        """Write down what is known."""
        if self.file is not None and rank() == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, json.dumps(self.known(), indent=1).encode())

    def settings(self) -> dict[str, Any]:
        """What its verdicts depend on, besides the run whose folder ``file`` lies in, as JSON values."""
        return {"batches": self.limit, "base": weights_digest(self.base)}

    @torch.no_grad()
    def _sums(self, network: nn.Module, portions: Iterable[Portion]) -> Tensor:
        """Loss, samples, right answers and labels that could be compared, over all processes."""
        objective = Objective(Recipe(loss=self.loss), None)
        sums = torch.zeros(4, dtype=torch.float64)
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        try:
            for portion in portions:
                outputs = run_batch(network, portion.batch)
                loss = float(objective(outputs, None, portion.batch, network, 1.0).data)
                right, judged = class_hits(outputs, portion.batch.labels)
                if portion.size:
                    sums += torch.tensor([loss * portion.size, portion.size, float(right), judged])
        finally:
            restore_modes(modes)
        all_sum(sums)
        return sums
