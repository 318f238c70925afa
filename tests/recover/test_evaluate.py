"""Accuracy against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attrim.errors import DataError
from attrim.recover import evaluate

SCORES = torch.tensor([[3.0, 1, 0], [0, 2, 1], [1, 0, 4], [5, 0, 0]])  # largest: 0 1 2 0


def test_fraction_over_batches_of_different_size():
    batches = [(SCORES[:3], torch.tensor([0, 1, 1])), (SCORES[3:], torch.tensor([0]))]
    assert evaluate(nn.Identity(), batches) == 0.75


def test_class_scores_as_labels_and_dicts():
    batches = [{"x": SCORES, "labels": torch.eye(3)[[0, 1, 2, 2]]}]
    assert evaluate(nn.Identity(), batches) == 0.75


def test_dense_prediction_and_ignored_positions():
    scores = SCORES.T.reshape(1, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [-100, 2]]])
    assert evaluate(nn.Identity(), [(scores, labels)]) == pytest.approx(2 / 3)


def test_modes_come_back():
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity())
    model[1].eval()
    assert evaluate(model, [(SCORES, torch.tensor([0, 1, 2, 0]))]) == 1.0
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "evaluation read no batch"),
        ([SCORES], "evaluation needs labels in every batch, found NoneType"),
        ([(SCORES, torch.zeros(3, dtype=torch.long))], r"labels of shape \(4,\) were expected, found \(3,\)"),
        ([(SCORES, torch.full((4,), -1))], "found no label >= 0"),
    ],
)
def test_bad_batches(batches, text):
    with pytest.raises(DataError, match=text):
        evaluate(nn.Identity(), batches)
