"""GlobalPru: one order of the channels for all samples, voted by them, which sparse training makes every sample keep."""

from __future__ import annotations

from attrim.methods.globalpru.history import History, history
from attrim.methods.globalpru.losses import Ranking
from attrim.methods.globalpru.masks import MaskAccuracy, measure_masks
from attrim.methods.globalpru.method import globalpru
from attrim.methods.globalpru.monitor import Agreement, measure_agreement
from attrim.methods.globalpru.vote import Votes

__all__ = [
    "Agreement",
    "History",
    "MaskAccuracy",
    "Ranking",
    "Votes",
    "globalpru",
    "history",
    "measure_agreement",
    "measure_masks",
]
