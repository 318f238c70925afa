"""Losses of fine-tuning: labels with smoothing, a teacher's softened scores, a teacher's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attrim.errors import DataError

__all__ = ["attention_map", "attention_transfer", "distillation"]


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
    log_teacher = F.log_softmax(teacher.to(student.dtype) / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(1)
    return divergence.mean() * temperature**2


def attention_map(activations: Tensor, dim: int = 1) -> Tensor:
    """Where a layer looks: squared activations summed over channels, each sample's map scaled to length 1.

    Args:
        activations: shape ``(N, …)`` with channels along ``dim`` and at least one axis of positions.
        dim: the axis of the channels.

    Returns:
        Shape ``(N, positions)``, float32 (or float64), rows of Euclidean length 1 (0 where all activations are 0).

    Source:
        Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 1 with p = 2.

    Example:
        >>> attention_map(torch.ones(1, 8, 2, 2))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    wide = activations if activations.dtype in (torch.float32, torch.float64) else activations.float()
    return F.normalize(wide.square().sum(dim).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, dim: int = 1) -> Tensor:
    """``‖A(F_S)/‖A(F_S)‖ - A(F_T)/‖A(F_T)‖‖²``, mean over samples; 0 when both look at the same places.

    Args:
        student: activations ``(N, …)`` with channels along ``dim``.
        teacher: activations of the same shape but for the number of channels, without gradient.
        dim: the axis of the channels.

    Raises:
        DataError: the positions differ.

    Source:
        Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 2 with p = 2, squared as in the
        authors' code.

    Example:
        >>> attention_transfer(torch.ones(1, 4, 2, 2), torch.ones(1, 8, 2, 2))
        tensor(0.)
    """
    ours, theirs = attention_map(student, dim), attention_map(teacher, dim)
    if ours.shape != theirs.shape:
        raise DataError(
            f"attention is compared position by position: the student's activations have shape "
            f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. Use the dense network that was pruned as "
            "the teacher."
        )
    return (ours - theirs).square().sum(1).mean()
