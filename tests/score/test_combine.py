from __future__ import annotations

import pytest
import torch

from attrim.errors import CriterionError
from attrim.score.combine import NORMALIZERS, REDUCTIONS, normalized, reduced

MEMBERS = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
VALUES = torch.tensor([1.0, 4.0, 3.0, 0.0])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("mean", [2.0, 3.0]),
        ("sum", [4.0, 6.0]),
        ("max", [3.0, 4.0]),
        ("min", [1.0, 2.0]),
        ("prod", [3.0, 8.0]),
        ("first", [1.0, 4.0]),
    ],
)
def test_reductions(reduction: str, expected: list[float]) -> None:
    assert reduced(MEMBERS, reduction).tolist() == expected


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("none", [1, 4, 3, 0]),
        ("mean", [0.5, 2, 1.5, 0]),
        ("max", [0.25, 1, 0.75, 0]),
        ("sum", [0.125, 0.5, 0.375, 0]),
        ("standardize", [0.25, 1, 0.75, 0]),
        ("gaussian", [(v - 2) / 2.5**0.5 for v in (1, 4, 3, 0)]),
        ("lamp", [1 / 8, 1, 3 / 7, 0]),
        ("rank", [0.5, 1, 0.75, 0.25]),
    ],
)
def test_normalizers(normalize: str, expected: list[float]) -> None:
    assert normalized(VALUES, normalize).tolist() == pytest.approx(expected)


def test_every_name_has_an_expected_value_above() -> None:
    assert set(REDUCTIONS) == {"mean", "sum", "max", "min", "prod", "first"}
    assert set(NORMALIZERS) == {"none", "mean", "max", "sum", "standardize", "gaussian", "lamp", "rank"}


@pytest.mark.parametrize("normalize", ["mean", "max", "sum", "standardize", "gaussian", "lamp"])
def test_a_group_of_zeros_stays_finite(normalize: str) -> None:
    assert normalized(torch.zeros(3), normalize).tolist() == [0, 0, 0]


@pytest.mark.parametrize("normalize", ["lamp", "rank"])
def test_among_equals_the_lower_index_counts_more(normalize: str) -> None:
    value = normalized(torch.tensor([1.0, 2.0, 1.0, 2.0]), normalize)
    assert value.argsort(descending=True).tolist() == [1, 3, 0, 2]
    assert len(set(value.tolist())) == 4


@pytest.mark.parametrize("normalize", list(NORMALIZERS))
def test_normalizing_keeps_the_order(normalize: str) -> None:
    value = torch.rand(20, dtype=torch.float64)
    assert normalized(value, normalize).argsort().tolist() == value.argsort().tolist()


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(CriterionError, match=r"reduction: expected one of mean, sum, max.*found 'average'"):
        reduced(MEMBERS, "average")
    with pytest.raises(CriterionError, match=r"normalize: expected one of none, mean.*found 'softmax'"):
        normalized(VALUES, "softmax")
