"""Scores are checked where they are made: vectors, finite, float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attrim.core.scores import Scores
from attrim.errors import CriterionError


@pytest.mark.parametrize(
    "value",
    [[0.5, 2, 1], (0.5, 2, 1), np.array([0.5, 2.0, 1.0]), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)],
    ids=["list", "tuple", "numpy", "float64"],
)
def test_vectors_become_float32(value: object) -> None:
    stored = Scores({"conv1": value}, "mine").values["conv1"]  # type: ignore[dict-item]
    assert stored.dtype == torch.float32
    assert stored.tolist() == [0.5, 2.0, 1.0]


def test_scores_are_cut_from_the_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not Scores({"conv1": weight * 2}, "mine").values["conv1"].requires_grad


def test_a_matrix_is_refused_with_its_shape() -> None:
    with pytest.raises(
        CriterionError,
        match=r"criterion 'mine': expected one score per channel of group 'conv1' .* found shape \(2, 3\)",
    ):
        Scores({"conv1": torch.zeros(2, 3)}, "mine")


def test_a_scalar_is_refused() -> None:
    with pytest.raises(CriterionError, match=r"found shape \(\)"):
        Scores({"conv1": 1.0}, "mine")  # type: ignore[dict-item]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_counted(bad: float) -> None:
    with pytest.raises(
        CriterionError, match="criterion 'l2': 2 of 4 scores of group 'conv1' are NaN or infinite"
    ) as caught:
        Scores({"conv1": [1.0, bad, 0.0, bad]}, "l2")
    assert "named_parameters" in str(caught.value)


def test_numbers_too_large_for_float32_are_refused() -> None:
    with pytest.raises(CriterionError, match="1 of 2 scores"):
        Scores({"conv1": torch.tensor([1.0, 1e300], dtype=torch.float64)}, "mine")
