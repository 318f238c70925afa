"""Figures of a training run: summed up over an epoch, written as JSON lines and, when asked, for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attrim.core.plan import write_atomic
from attrim.errors import CheckpointError, MissingDependencyError
from attrim.modules.batches import logits_of

__all__ = ["METRICS_FILE", "Log", "Tally", "class_hits"]

METRICS_FILE = "metrics.jsonl"


class Tally:
    """Sums over the epoch under way, weighted by samples; plain numbers, so that a checkpoint can hold them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.samples, self.right, self.judged, self.seconds = 0.0, 0.0, 0.0, 0.0

    def add(self, values: Mapping[str, float], samples: float, right: float, judged: float, seconds: float) -> None:
        """Take in one batch: means over its samples, and how many labels were right of how many."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples
        self.samples += samples
        self.right += right
        self.judged += judged
        self.seconds += seconds

    def report(self) -> dict[str, float]:
        """Means of the epoch: ``loss`` and its parts as ``loss_NAME``, accuracy where there were class labels."""
        count = max(1.0, self.samples)
        figures = {name if name == "loss" else f"loss_{name}": total / count for name, total in self.sums.items()}
        if self.judged:
            figures["accuracy"] = self.right / self.judged
        return figures

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        vars(self).update(state)


def class_hits(outputs: Any, labels: Any) -> tuple[Tensor, int]:
    """How many predictions are right, and how many could be judged: 0 without class indices for labels."""
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        scores = logits_of(outputs)
        if scores.ndim > 1 and scores.argmax(1).shape == labels.shape:
            return (scores.argmax(1) == labels).sum(), labels.numel()
    return torch.zeros(()), 0


class Log:
    """``metrics.jsonl`` and TensorBoard events in a folder.

    Args:
        folder: where they go; None writes nothing.
        tensorboard: whether to write events too.
        done: reports of epochs that are done already; the file then begins with exactly these.

    Raises:
        MissingDependencyError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, done: Sequence[Mapping[str, Any]]) -> None:
        self.path = None if folder is None else folder / METRICS_FILE
        self._board = _board(folder, len(done)) if tensorboard and folder is not None else None
        if self.path is not None and (done or self.path.exists()):
            with _writing(self.path):
                write_atomic(self.path, b"".join(_line(report) for report in done))

    def add(self, report: Mapping[str, Any]) -> None:
        """Write down one epoch."""
        if self.path is not None:
            with _writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write(_line(report))
                    file.flush()
                    os.fsync(file.fileno())
        if self._board is not None:
            for name, value in report.items():
                if name != "epoch":
                    self._board.add_scalar(name, value, int(report["epoch"]))
            self._board.flush()

    def close(self) -> None:
        """Close the events file."""
        if self._board is not None:
            self._board.close()


class _writing:
    """Turns a failed write into an error that says how to go on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(
                f"cannot write '{self.path}': {error.strerror or error}. The checkpoints beside it are whole. Make room "
                "or correct the permissions, then continue with resume=True (attrim: --resume)."
            ) from error


def _line(report: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(report)) + "\n").encode()


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("tensorboard", "tensorboard", "tensorboard=True") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
