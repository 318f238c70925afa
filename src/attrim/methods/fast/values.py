"""Values of samples, and what is known about a candidate from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attrim.methods.fast.stops import Lesson
from attrim.modules.batches import Batch, logits_of
from attrim.recover.evaluate import answers

__all__ = ["Judged", "all_outputs", "given_up", "top1", "with_clearness"]


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known about a candidate.

    Attributes:
        value: mean over the samples; an estimate where the candidate was given up.
        complete: whether all samples were judged.
        samples: how many were.
        lesson: where it and the best candidate of its time disagreed, for :class:`Doubt`; None if it was not compared.
    """

    value: float
    complete: bool
    samples: int
    lesson: Lesson | None = None


def top1(outputs: Any, batch: Batch) -> Tensor:
    """1 for each label that is hit, 0 for each that is missed, and by how much the best score leads; shape ``(n, 2)``.

    Negative labels are left out.
    """
    scores = logits_of(outputs)
    guessed, labels = answers(scores, batch.labels)
    two = scores.topk(2, dim=1).values if scores.ndim > 1 and scores.shape[1] > 1 else None
    lead = two.select(1, 0) - two.select(1, 1) if two is not None else scores.abs().reshape(guessed.shape)
    return torch.stack([(guessed == labels).float(), lead.float()], -1)[labels >= 0].reshape(-1, 2)


def given_up(seen: Tensor, rival: Tensor, best: Tensor, learned: Lesson | None) -> Judged:
    """An estimate: the best value, less what was lost to it so far, as if nothing more were lost."""
    lost = float((seen.double() - rival[: seen.numel()].double()).sum()) / best.numel()
    return Judged(float(best.double().mean()) + min(lost, -1 / best.numel()), False, seen.numel(), learned)


def all_outputs(outputs: Any, batch: Batch) -> Tensor:
    return torch.cat([leaf.flatten().float() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)])


def with_clearness(values: Tensor) -> Tensor:
    """Values with a column of clearness; unknown is 0."""
    return values if values.ndim == 2 else torch.stack([values, torch.zeros_like(values)], 1)
