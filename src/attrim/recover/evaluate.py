"""Accuracy of a classifier, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import DataError
from attrim.modules.batches import batch_source, device_of, logits_of, read_batch, run_batch
from attrim.modules.progress import progress

__all__ = ["answers", "count_right", "evaluate", "restore_modes"]


def evaluate(model: nn.Module, batches: Iterable[Any]) -> float:
    """Top-1 accuracy of ``model`` on labelled batches, in [0, 1].

    The model runs in eval mode without gradients and gets its modes back. Class scores have shape ``(N, classes, …)``;
    labels are indices of shape ``(N, …)`` (per position for dense prediction), or scores of the same shape as the
    outputs, of which the largest counts. Negative labels are left out.

    Args:
        model: the classifier, on any device.
        batches: iterable of ``(inputs, labels)`` or of dicts with a label entry.

    Raises:
        DataError: no batches, no labels in them, or labels of another shape than the outputs.

    Example:
        >>> attrim.recover.evaluate(model, test_batches)
        0.889
    """
    right, counted = count_right(model, batches)
    return right / counted


@torch.no_grad()
def count_right(model: nn.Module, batches: Iterable[Any], rank: int = 0, world: int = 1) -> tuple[int, int]:
    """Right answers and labels in all, as :func:`evaluate` counts them.

    Args:
        model, batches: as for :func:`evaluate`.
        rank, world: one of several processes that share the batches; it takes every ``world``-th, and may get none.

    Raises:
        DataError: as for :func:`evaluate`.
    """
    source = batch_source(batches)
    device = device_of(model)
    right = torch.zeros((), dtype=torch.int64, device=device)
    counted = torch.zeros((), dtype=torch.int64, device=device)
    read = 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for raw in progress(source, "evaluating", show=rank == 0):
            read += 1
            if (read - 1) % world != rank:
                continue
            batch = read_batch(raw, device)
            guessed, labels = answers(logits_of(run_batch(model, batch)), batch.labels)
            right += (guessed == labels).sum()
            counted += (labels >= 0).sum()
    finally:
        restore_modes(modes)
    if not read:
        raise DataError("evaluation read no batch: the source is empty, or a generator that was used up before.")
    if not int(counted) and world == 1:
        raise DataError("evaluation found no label >= 0 in the batches, so there is nothing to compare with.")
    return int(right), int(counted)


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give modules back the train flags that were noted."""
    for module, training in modes:
        module.training = training


def answers(scores: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(labels, Tensor):
        raise DataError(
            f"evaluation needs labels in every batch, found {type(labels).__name__}. Yield (inputs, labels) tuples, "
            "or dicts with a 'labels' entry."
        )
    guessed = scores.argmax(1) if scores.ndim > 1 else (scores > 0).long()
    if labels.shape == scores.shape and labels.shape != guessed.shape:
        labels = labels.argmax(1)
    if labels.shape != guessed.shape:
        raise DataError(
            f"the model's scores have shape {tuple(scores.shape)}, so labels of shape {tuple(guessed.shape)} were "
            f"expected, found {tuple(labels.shape)}."
        )
    return guessed, labels
