"""Attention gates: small modules that hang on the taps of channel groups, are trained, read, and are gone or folded."""

from __future__ import annotations

from attrim.modules.gates.attach import Collected
from attrim.modules.gates.gated import Gated
from attrim.modules.gates.gates import Gates
from attrim.modules.gates.kinds import KINDS

__all__ = ["KINDS", "Collected", "Gated", "Gates"]
