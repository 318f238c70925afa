"""What a training step minimises: labels, a teacher's scores, its attention, and a user's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attrim.errors import DataError
from attrim.modules.batches import Batch, logits_of
from attrim.recover.losses import distillation
from attrim.recover.recipe import Recipe
from attrim.recover.transfer import AttentionTransfer

__all__ = ["Objective", "Parts"]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The loss of a batch.

    Attributes:
        data: what depends on the batch, weighted and summed: a mean over its samples.
        regularizer: what does not, or None.
        named: each part before its weight, detached.
    """

    data: Tensor
    regularizer: Tensor | None
    named: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """``(1 - distill) · labels + distill · distillation + attention · transfer + regularizer``.

    Attributes:
        recipe: the weights.
        transfer: compares attention, or None.
    """

    recipe: Recipe
    transfer: AttentionTransfer | None

    def __call__(self, outputs: Any, taught: Any, batch: Batch, model: nn.Module, progress: float) -> Parts:
        """The loss of a batch.

        Args:
            outputs: of the student.
            taught: the teacher's outputs, or None without one.
            batch: labels and the batch as it came.
            model: the student, for the regularizer.
            progress: of the run, in [0, 1].

        Raises:
            DataError: neither labels nor a teacher, or a term that is not a scalar.
        """
        recipe = self.recipe
        named: dict[str, Tensor] = {}
        unlabelled = batch.labels is None and recipe.loss is None
        weight = 0.0 if taught is None else 1.0 if unlabelled else recipe.distill
        total: Tensor | None = None
        if weight:
            named["distillation"] = distillation(logits_of(outputs), logits_of(taught), recipe.temperature)
            total = weight * named["distillation"]
        if total is None or weight < 1:
            named["labels"] = hard = self._labels(outputs, batch)
            total = hard if total is None else (1 - weight) * hard + total
        if self.transfer is not None:
            named["attention"] = self.transfer.loss()
            total = total + recipe.attention * named["attention"]
        extra = None if recipe.regularizer is None else _scalar(recipe.regularizer(model, progress), "regularizer")
        if extra is not None:
            named["regularizer"] = extra
        return Parts(total, extra, {name: value.detach() for name, value in named.items()})

    def _labels(self, outputs: Any, batch: Batch) -> Tensor:
        if self.recipe.loss is not None:
            return _scalar(self.recipe.loss(outputs, batch.raw), "loss")
        if batch.labels is None:
            raise DataError(
                "fine-tuning needs labels in every batch or a teacher, found neither. Yield (inputs, labels) tuples, "
                "or pass teacher=dense_model."
            )
        smoothing = 0.0 if self.recipe.mixes else self.recipe.label_smoothing  # mixed labels are smooth already
        return F.cross_entropy(logits_of(outputs), batch.labels, label_smoothing=smoothing)


def _scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{name}: expected a function that returns one number as a tensor, found {found}.")
    return value.reshape(())
