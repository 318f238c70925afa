"""Learning rates over a run."""

from __future__ import annotations

import math

__all__ = ["warmup_constant", "warmup_cosine"]


def warmup_cosine(step: int, total: int, warmup: int = 0) -> float:
    """Factor of the peak learning rate at ``step``: a straight rise, then half a cosine down to zero.

    Args:
        step: counted from 0.
        total: steps of the whole run, at least 1.
        warmup: steps of the rise; the first step already has ``1 / (warmup + 1)`` of the peak.

    Returns:
        A factor in (0, 1].

    Source:
        Loshchilov and Hutter, SGDR, ICLR 2017 (one period, no restart).

    Example:
        >>> [round(warmup_cosine(s, 6, 2), 2) for s in range(6)]
        [0.33, 0.67, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_constant(step: int, total: int, warmup: int = 0) -> float:
    """Factor of the peak learning rate at ``step``: the same rise, then 1. Arguments as for :func:`warmup_cosine`.

    Example:
        >>> [round(warmup_constant(s, 4, 2), 2) for s in range(4)]
        [0.33, 0.67, 1.0, 1.0]
    """
    return (step + 1) / (warmup + 1) if step < warmup else 1.0
