"""Losses and schedules against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrim.errors import DataError
from attrim.modules.batches import read_batch
from attrim.recover.losses import attention_map, attention_transfer, distillation
from attrim.recover.objective import Objective
from attrim.recover.recipe import Recipe
from attrim.recover.schedule import warmup_constant, warmup_cosine

CPU = torch.device("cpu")
SCORES, LABELS, TAUGHT = torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([[0.0, 2.0]])


def parts_of(taught: Tensor | None = TAUGHT, labels: Tensor | None = LABELS, **options: object) -> tuple[float, dict]:
    batch = read_batch((SCORES, labels) if labels is not None else SCORES, CPU)
    parts = Objective(Recipe(**options), None)(SCORES, taught, batch, nn.Identity(), 0.25)
    return parts.data, dict(parts.named), parts.regularizer


def test_distillation_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # at T = 2 the teacher says 3/4 and 1/4, the student 1/2 and 1/2
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distillation(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match=r"student's scores have shape \(1, 2\), the teacher's \(1, 3\)"):
        distillation(student, torch.zeros(1, 3))


def test_attention_by_hand():
    # squares summed over two channels: (3² + 4², 0) = (25, 0) and (0, 0, ...) -> unit vectors (1, 0) and (0.6, 0.8)
    student = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
    teacher = torch.tensor([[[math.sqrt(6), math.sqrt(8)]]])
    assert attention_map(student).tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(attention_map(teacher), torch.tensor([[0.6, 0.8]]))
    assert attention_transfer(student, teacher).item() == pytest.approx(0.4**2 + 0.8**2, rel=1e-6)
    doubled = torch.cat([2 * student, student.zero_()])  # the mean over samples; no activation at all is 0, not NaN
    assert attention_transfer(doubled, teacher.expand(2, -1, -1)).item() == pytest.approx((0.8 + 1.0) / 2, rel=1e-6)


def test_attention_forgets_scale_and_number_of_channels_but_not_place():
    x = torch.rand(2, 3, 4, 4)
    assert attention_transfer(x, 7 * torch.cat([x, x], 1)).item() == pytest.approx(0, abs=1e-6)
    assert attention_transfer(x, x.flip(3)).item() > 0.01
    tokens = torch.rand(2, 16, 5)
    assert attention_transfer(tokens, tokens[..., [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]], dim=2).item() < 1e-6
    with pytest.raises(
        DataError, match=r"attention is compared position by position: .* \(2, 3, 4, 4\), the teacher's"
    ):
        attention_transfer(x, torch.rand(2, 3, 2, 2))


def test_the_mixture_of_labels_and_teacher():
    hard, soft = F.cross_entropy(SCORES, LABELS, label_smoothing=0.2), distillation(SCORES, TAUGHT, 3.0)
    loss, named, extra = parts_of(label_smoothing=0.2, temperature=3.0, distill=0.25)
    torch.testing.assert_close(loss, 0.75 * hard + 0.25 * soft)
    assert (named["labels"], named["distillation"], extra) == (hard, soft, None)
    assert parts_of(distill=1.0)[0] == distillation(SCORES, TAUGHT)
    assert parts_of(labels=None, distill=0.1)[0] == distillation(SCORES, TAUGHT)  # nothing else to go by
    assert parts_of(None)[0] == F.cross_entropy(SCORES, LABELS)
    with pytest.raises(DataError, match="needs labels in every batch or a teacher, found neither"):
        parts_of(None, None)


def test_own_terms():
    seen = []

    def own(outputs, batch):
        seen.append(batch)
        return (outputs - batch[0]).square().mean() + 2

    loss, named, extra = parts_of(
        distill=0.5, loss=own, regularizer=lambda model, progress: torch.tensor([progress * 8])
    )
    torch.testing.assert_close(loss, 0.5 * torch.tensor(2.0) + 0.5 * distillation(SCORES, TAUGHT))
    assert (float(extra), float(named["regularizer"]), float(named["labels"])) == (2.0, 2.0, 2.0)
    assert torch.equal(seen[0][1], LABELS)
    with pytest.raises(DataError, match=r"loss: expected a function that returns one number .* shape \(1, 2\)"):
        parts_of(loss=lambda outputs, batch: outputs)
    with pytest.raises(DataError, match=r"regularizer: expected .* found float"):
        parts_of(regularizer=lambda model, progress: 1.0)


def test_schedule_rises_then_falls():
    rates = [warmup_cosine(s, 100, 10) for s in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    flat = [warmup_constant(s, 100, 10) for s in range(100)]
    assert flat[:10] == rates[:10]
    assert set(flat[10:]) == {1.0}
