"""How far the samples agree with the global order: Kendall's tau, overlap of the first channels, relative variance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrim.methods.globalpru.scores import Reader
from attrim.methods.globalpru.vote import pair_wins
from attrim.modules.gates import Gates
from attrim.score.data import forward, stream, undisturbed

__all__ = ["Agreement", "measure_agreement"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one group, over samples and places.

    Attributes:
        tau: mean of Kendall's tau between a sample's order and the global one, in [-1, 1]; 1 where all are the same,
            about 0 where they have nothing to do with each other. Equal scores count as neither agreeing nor disagreeing.
        overlap: mean share of the global order's first ``kept`` channels that are among a sample's first ``kept``, in
            [0, 1]; ``kept / C`` by chance.
        variance: ``Var(a_c) / Mean(a_c)²`` of the attention over the samples, mean over channels; 0 where the attention
            does not depend on the sample.
    """

    tau: float
    overlap: float
    variance: float


def measure_agreement(
    model: nn.Module,
    gates: Gates,
    orders: Mapping[str, Tensor],
    kept: Mapping[str, int],
    batches: Iterable[Any],
    *,
    reader: Reader | None = None,
    samples: int | None = None,
) -> dict[str, Agreement]:
    """Go through data once, in eval mode and without gradients; the model and its statistics stay as they are.

    Args:
        model: the network that the gates belong to.
        gates: attached meanwhile.
        orders: group -> ``(C,)``, the most important channel first.
        kept: group -> how many stay.
        batches: in any form that :func:`attrim.score` takes.
        reader: what is ranked, logits (the default) or attention.
        samples: stop after the batch that reaches this many; None reads all.

    Returns:
        Group -> agreement; groups that did not run are absent.

    Example:
        >>> measure_agreement(model, gates, outcome.statistics["orders"], outcome.statistics["kept"], loader)
    """
    sums = {group: _Sums(orders[group], kept[group]) for group in orders}
    reader = reader or Reader()
    with undisturbed(model), torch.no_grad(), gates.attached(model) as collected:
        for batch in stream(model, batches, "agreement", samples=samples, show=False):
            forward(model, batch)
            for group, (scores, attention) in reader.read(collected).items():
                if group in sums:
                    sums[group].add(scores, attention)
    return {group: s.result() for group, s in sums.items() if s.samples}


class _Sums:
    """Running sums of one group."""

    def __init__(self, order: Tensor, kept: int) -> None:
        self.order, self.kept, self.samples = order, kept, 0
        self.concordance = self.shared = 0.0
        self.first = self.second = torch.zeros(len(order), dtype=torch.float64)

    def add(self, scores: Tensor, attention: Tensor) -> None:
        ranked = scores[:, self.order.to(scores.device)]
        wins = pair_wins(ranked)
        self.concordance += float((wins - wins.T).triu(1).sum())
        chosen = ranked.argsort(dim=1, descending=True, stable=True)[:, : self.kept]
        self.shared += float((chosen < self.kept).sum()) / self.kept
        whole = attention.double().cpu()
        self.first, self.second = self.first + whole.sum(0), self.second + whole.square().sum(0)
        self.samples += len(scores)

    def result(self) -> Agreement:
        size = len(self.order)
        pairs = max(1, size * (size - 1) // 2)
        mean = self.first / self.samples
        variance = (self.second / self.samples - mean.square()).clamp_min(0)
        relative = torch.where(mean == 0, 0.0, variance / mean.square())
        return Agreement(self.concordance / pairs / self.samples, self.shared / self.samples, float(relative.mean()))
