"""Winning accuracy back after a cut: reconstruction, recalibration, fine-tuning, and the data and figures they need."""

from attrim.recover.data import ImageData, open_data
from attrim.recover.evaluate import evaluate
from attrim.recover.finetune import finetune
from attrim.recover.fold import fold_bias
from attrim.recover.free import free_recovery, output_gap
from attrim.recover.recalibrate import recalibrate
from attrim.recover.reconstruct import reconstruct
from attrim.recover.sparse import GroupLasso, GrowingL2

__all__ = [
    "GroupLasso",
    "GrowingL2",
    "ImageData",
    "evaluate",
    "finetune",
    "fold_bias",
    "free_recovery",
    "open_data",
    "output_gap",
    "recalibrate",
    "reconstruct",
]
