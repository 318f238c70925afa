"""Winning accuracy back after a cut: recalibration, fine-tuning, and the data and figures they need."""

from attrim.recover.data import ImageData, open_data
from attrim.recover.evaluate import evaluate
from attrim.recover.finetune import finetune
from attrim.recover.recalibrate import recalibrate

__all__ = ["ImageData", "evaluate", "finetune", "open_data", "recalibrate"]
