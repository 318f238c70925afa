"""Losses of fine-tuning: labels with smoothing, a teacher's softened scores, or both."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attrim.errors import DataError

__all__ = ["distillation", "mixed_loss"]


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation: ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, mean over samples.

    Args:
        student: class scores of shape ``(N, C, …)``.
        teacher: class scores of the same shape, without gradient.
        temperature: ``T > 0``; the factor ``T²`` keeps the gradients' size.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> distillation(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"the student's scores have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; expected "
            "the same. Use the dense network that was pruned as the teacher."
        )
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(1)
    return divergence.mean() * temperature**2


def mixed_loss(
    scores: Tensor,
    labels: Any,
    teacher: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    temperature: float = 4.0,
    distill: float = 0.5,
) -> Tensor:
    """``(1 - distill) · cross entropy + distill · distillation``; one of the two where only one is possible.

    Args:
        scores: class scores of shape ``(N, C, …)``.
        labels: class indices, class probabilities, or None (needs a teacher).
        teacher: the teacher's scores, or None.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        temperature: see :func:`distillation`.
        distill: weight of the teacher, in [0, 1].

    Raises:
        DataError: neither labels nor a teacher.
    """
    if teacher is None and labels is None:
        raise DataError(
            "fine-tuning needs labels in every batch or a teacher, found neither. Yield (inputs, labels) tuples, "
            "or pass teacher=dense_model."
        )
    if teacher is None:
        return F.cross_entropy(scores, labels, label_smoothing=label_smoothing)
    soft = distillation(scores, teacher, temperature)
    if labels is None or distill == 1:
        return soft
    return (1 - distill) * F.cross_entropy(scores, labels, label_smoothing=label_smoothing) + distill * soft
