"""What the method is for, as a measurement: accuracy when every sample has its own mask, and when all share one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrim.methods.globalpru.scores import Reader
from attrim.modules.gates import Gates
from attrim.recover.evaluate import evaluate

__all__ = ["MaskAccuracy", "masked", "measure_masks"]


@dataclass(frozen=True, slots=True)
class MaskAccuracy:
    """Top-1 accuracies of the gated network, in [0, 1], with nothing trained after masking.

    Attributes:
        open: no mask.
        own: every sample keeps the channels that it scores highest.
        shared: all samples keep the first channels of the global order.
    """

    open: float
    own: float
    shared: float

    @property
    def gap(self) -> float:
        """What is lost by sharing one mask: ``own - shared``."""
        return self.own - self.shared


def measure_masks(
    model: nn.Module,
    gates: Gates,
    orders: Mapping[str, Tensor],
    kept: Mapping[str, int],
    batches: Iterable[Any],
    *,
    reader: Reader | None = None,
) -> MaskAccuracy:
    """Mask ``C - kept`` channels of every group by setting their gates to zero, and count right answers.

    Args:
        model: the network that the gates belong to.
        gates: trained.
        orders: group -> ``(C,)``, the most important channel first; other groups are not masked.
        kept: group -> how many stay.
        batches: labelled; gone through three times.
        reader: what a sample ranks by, logits (the default) or attention.

    Example:
        >>> found = measure_masks(model, gates, orders, kept, test_batches)
        >>> found.gap    # shrinks from the vote to the end of the sparse training
    """
    reader = reader or Reader()
    with torch.no_grad(), gates.attached(model):
        plain = evaluate(model, batches)
        with masked(gates, kept, reader=reader):
            own = evaluate(model, batches)
        with masked(gates, kept, orders, reader=reader):
            shared = evaluate(model, batches)
    return MaskAccuracy(plain, own, shared)


@contextmanager
def masked(
    gates: Gates, kept: Mapping[str, int], orders: Mapping[str, Tensor] | None = None, *, reader: Reader | None = None
) -> Iterator[None]:
    """Inside, the gates of each group in ``kept`` let ``kept`` channels through and give zero for the others.

    Args:
        gates: whose attention is masked; the masks of later layers see what the earlier ones leave.
        kept: group -> how many stay.
        orders: group -> ``(C,)``: the same mask for all samples; None lets each sample choose.
        reader: what a sample chooses by.
    """
    reader = reader or Reader()
    handles = []
    try:
        for group, count in kept.items():
            own = {id(unit): unit for unit in (gates.gate_of(place) for place in gates.places.get(group, ()))}
            first = None if orders is None else orders[group][:count]
            hook = _masking(count, first, reader)
            handles += [unit.register_forward_hook(hook) for unit in own.values()]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masking(count: int, first: Tensor | None, reader: Reader) -> Callable[[nn.Module, Any, Any], Any]:
    def mask(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, attention = out
        if first is not None:
            let = torch.zeros_like(attention).index_fill_(1, first.to(attention.device), 1)
        else:
            scores = logits if reader.ranked == "logits" else attention
            chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
            let = torch.zeros_like(attention).scatter_(1, chosen, 1)
        return logits, attention * let

    return mask
