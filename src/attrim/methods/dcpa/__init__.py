"""DCP-A: widths (and depth) learned by gradient, guided by attention to what the layers do."""

from __future__ import annotations

from attrim.methods.dcpa.method import dcpa
from attrim.methods.dcpa.options import DcpaOptions
from attrim.methods.dcpa.searched import Searched, search_policy
from attrim.methods.dcpa.stage2 import initialised, train_derived

__all__ = ["DcpaOptions", "Searched", "dcpa", "initialised", "search_policy", "train_derived"]
