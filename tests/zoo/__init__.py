"""Pattern networks: small modules, each with one idea of how channels are used, and what must happen to it."""

from __future__ import annotations

from . import (
    attention,
    chains,
    concat,
    gates,
    grouped,
    misc,
    norms,
    params,
    positions,
    products,
    recurrent,
    reshape,
    split,
    tokens,
    transformer,
    traps,
    vision,
)
from .pattern import REGISTRY, Pattern

__all__ = [
    "REGISTRY",
    "Pattern",
    "attention",
    "chains",
    "concat",
    "gates",
    "grouped",
    "misc",
    "norms",
    "params",
    "positions",
    "products",
    "recurrent",
    "reshape",
    "split",
    "tokens",
    "transformer",
    "traps",
    "vision",
]
