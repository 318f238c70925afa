"""Criteria: how important each channel of each group is. One idea a file; the table of names is in ``table``."""

from attrim.score.api import score
from attrim.score.table import CRITERIA, Criterion

__all__ = ["CRITERIA", "Criterion", "score"]
