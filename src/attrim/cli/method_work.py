"""What ``attrim prune`` hands to a method that trains: data, folder, seed; and whether such a stage goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrim.cli.runs import Run
from attrim.cli.screen import note
from attrim.cli.settings import PruneSettings
from attrim.methods.stages import FILE
from attrim.methods.table import METHODS
from attrim.recover import ImageData

__all__ = ["AGAIN", "base_is_needed", "in_method", "method_options", "plain_batches", "sized_by_option"]

AGAIN = (
    "dense",
    "gates",
    "gate training",
    "vote",
    "agreement",
    "attention",
    "search space",
    "search",
    "derived",
    "cut",
    "reconstruct",
    "recalibrate",
    "failed",
)
"""Steps whose lines are written once more when a method goes on."""


def sized_by_option(settings: PruneSettings) -> bool:
    """Whether a method is told its size by its own ``ratio`` or ``ratios``, and by nothing else."""
    own = any(settings.option.get(name) is not None for name in ("ratio", "ratios"))
    limits = (settings.keep_macs, settings.keep_params, settings.keep_channels)
    return settings.method in METHODS and own and all(limit is None for limit in limits)


def in_method(settings: PruneSettings, run: Run) -> bool:
    """Whether a method has begun in the run's folder, and its stages can be read."""
    return settings.method in METHODS and settings.rounds == 1 and (run.method / FILE).is_file()


def base_is_needed(settings: PruneSettings, run: Run) -> bool:
    """Whether the network that a method gave, from which the cut was made, is to be recovered towards."""
    recovered = any(line["step"] == "recovered" for line in run.lines())
    return in_method(settings, run) and settings.recover == "free" and not recovered


def method_options(settings: PruneSettings, run: Run, images: ImageData | None, resume: bool) -> dict[str, Any]:
    """Keywords for :func:`attrim.prune` where the method is one of :data:`attrim.methods.table.METHODS`."""
    options: dict[str, Any] = {"on_epoch": _logger(run)}
    if images is not None:
        options["augmented"] = images.batches("train", augment=True, shuffle=True)
    if settings.rounds == 1:  # rounds have a seed of their own and are kept whole
        options |= {"seed": settings.seed, "folder": run.method, "resume": resume}
    return options


def plain_batches(images: ImageData | None) -> Any:
    """Images as attention is read from them: in their order, without augmentation."""
    return None if images is None else images.batches("train")


def _logger(run: Run) -> Any:
    def log(report: Mapping[str, Any]) -> None:
        run.log("gate training", **{f"train_{k}" if k == "accuracy" else k: v for k, v in report.items()})
        figures = [f"{name} {report[name]:.4f}" for name in ("loss", "tau", "overlap") if name in report]
        note(f"   epoch {report.get('epoch', '?')} of the method's own training: {', '.join(figures)}")

    return log
