"""The words that criteria share."""

from __future__ import annotations

from typing import Literal

__all__ = ["Missing", "Normalize", "Reduction", "Role"]

Role = Literal["out", "in", "scale", "shift", "param"]
Reduction = Literal["mean", "sum", "max", "min", "first", "prod"]
Normalize = Literal["none", "mean", "max", "sum", "standardize", "gaussian", "lamp", "rank"]
Missing = Literal["error", "skip"]
