"""The figures of a network before and after a cut, measured side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attrim.methods.pipeline import Cost
from attrim.report.tables import Figures, Table, comparison_table
from attrim.ship import Latency, compare_latency, file_size, save_weights

__all__ = ["Measured", "measure"]


@dataclass(frozen=True, slots=True)
class Measured:
    """Both networks, and on what they were timed."""

    before: Figures
    after: Figures
    timing: Latency

    def table(self, title: str = "") -> Table:
        """Before and after side by side."""
        count = self.timing.threads
        threads = f", {count} thread{'s' if count > 1 else ''}" if self.timing.device == "cpu" else ""
        return comparison_table(self.before, self.after, title=title, latency=f"latency, {self.timing.device}{threads}")

    def log(self) -> dict[str, Any]:
        """The measured figures for a line of the metrics."""
        both = (self.before, self.after)
        return {
            "macs": [f.macs for f in both],
            "params": [f.params for f in both],
            "file_bytes": [f.file_bytes for f in both],
            "latency_ms": [f.latency_ms for f in both],
            "threads": self.timing.threads,
            "device": self.timing.device,
        }


def measure(
    costs: tuple[Cost, Cost], dense: nn.Module, small: nn.Module, inputs: Any, accuracy: Sequence[float | None]
) -> Measured:
    """Size on disk and latency of both networks, beside costs and accuracies that are known.

    Args:
        costs: of the dense and the small network.
        dense, small: the two networks.
        inputs: what they are timed on, in turn.
        accuracy: of the dense and the small network.
    """
    times = compare_latency({"before": dense, "after": small}, inputs)
    before, after = (
        Figures(cost.macs, cost.params, score, weights_size(model), time.median)
        for cost, score, model, time in zip(costs, accuracy, (dense, small), times.values(), strict=True)
    )
    return Measured(before, after, times["after"])


def weights_size(model: nn.Module) -> int:
    """Bytes of the model's weights as a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        save_weights(model, Path(folder) / "model.safetensors")
        return file_size(folder)
