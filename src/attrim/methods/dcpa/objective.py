"""What the policy minimises beside the task's loss: the distance to the budget, and the entropy of its choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["WEIGHTS", "CostRule", "cost_term", "entropy", "entropy_weight"]

CostRule = Literal["abslog", "tas", "dmcp", "one_sided"]

WEIGHTS: Mapping[str, float] = {"abslog": 2.0, "tas": 2.0, "dmcp": 0.1, "one_sided": 2.0}
"""The weight of each rule, where none is given."""


def cost_term(
    rule: CostRule, expected: Tensor, likeliest: Tensor, bounds: Tensor, whole: Tensor, tolerance: float = 0.05
) -> Tensor:
    """The cost part of the loss, of the resource that is furthest over its bound (or nearest to it).

    * ``abslog``: ``|log(E / R)|``, two-sided and without a unit;
    * ``tas``: ``log(E / R)`` where the likeliest network is above ``R``, ``-log(E / R)`` where it is more than ``tolerance``
      of the whole network below, else 0;
    * ``dmcp``: ``log(ρ |E - R|)`` below ``0.95 R``, ``log(ρ |E - 0.95 R|)`` above ``R``, else 0, in millions, with ``ρ``
      0.1 beyond 200 million, else 1;
    * ``one_sided``: ``log(max(E, R) / R)``.

    Args:
        rule: which.
        expected: shape ``(R,)``; expected cost, with gradients.
        likeliest: shape ``(R,)``; cost of the most probable network.
        bounds, whole: shape ``(R,)``; the budget and the value of the whole network.
        tolerance: of ``tas``, a fraction of the whole network.

    Source:
        ``tas``: code of Dong and Yang, TAS, NeurIPS 2019. ``dmcp``: Guo et al., CVPR 2020, as in mmrazor. ``one_sided``: Gao et
        al., NPPM, CVPR 2021. ``abslog`` is ours.

    Example:
        >>> cost_term("abslog", *(torch.tensor([v]) for v in (80.0, 80.0, 40.0, 100.0)))    # log 2
        tensor(0.6931)
    """
    worst = (expected.detach() / bounds).argmax()
    cost, mode, bound, total = expected[worst], likeliest[worst], bounds[worst], whole[worst]
    if rule == "abslog":
        return (cost / bound).log().abs()
    if rule == "one_sided":
        return (torch.maximum(cost, bound) / bound).log()
    if rule == "tas":
        if mode > bound:
            return (cost / bound).log()
        return -(cost / bound).log() if mode < bound - tolerance * total else cost * 0
    if 0.95 * bound <= cost < bound:
        return cost * 0
    away = ((cost - (bound if cost < bound else 0.95 * bound)) / 1e6).abs().clamp(min=1e-6)
    return (away * (0.1 if (cost - bound).abs() > 200e6 else 1.0)).log()


def entropy(log_probabilities: Tensor) -> Tensor:
    """Mean entropy over units (in nats), from ``(U, K)`` log-probabilities; padding has probability 0.

    Example:
        >>> entropy(torch.full((3, 4), -math.log(4)))    # log 4
        tensor(1.3863)
    """
    if not len(log_probabilities):
        return log_probabilities.sum()
    return -(log_probabilities.exp() * log_probabilities).sum(1).mean()


def entropy_weight(most: float, t: float) -> float:
    """0 for the first half of the search, then on a straight line to ``most``; ``t`` in [0, 1]."""
    return most * max(0.0, 2 * t - 1) if math.isfinite(t) else 0.0
