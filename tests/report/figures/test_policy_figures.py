"""Policies: probabilities, costs and attention are drawn as given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import sound, texts

from attrim.errors import InputError
from attrim.report.figures import attention_between_layers, layer_attention, policy_costs, policy_map

BLOCKS = ["layer1.0", "layer1.1", "layer2.0"]
EARLY = dict(zip(BLOCKS, ([0.2, 0.3, 0.5], [0.4, 0.3, 0.3], [0.6, 0.4]), strict=True))
LATE = dict(zip(BLOCKS, ([0.0, 0.1, 0.9], [0.9, 0.1, 0.0], [0.3, 0.7]), strict=True))


def test_policy_map_holds_the_probabilities():
    picture = sound(lambda: policy_map({1: EARLY, 20: LATE}, ["drop", "50 %", "100 %"]))
    early, late, _bar = picture.figure.axes
    for axes, given in ((early, EARLY), (late, LATE)):
        drawn = axes.images[0].get_array()
        for row, values in zip(drawn, given.values(), strict=True):
            assert row[: len(values)].tolist() == values
        assert drawn.mask.tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    assert [tuple(point) for point in late.collections[0].get_offsets()] == [(2, 0), (0, 1), (1, 2)]
    assert {"epoch 1", "epoch 20", "layer1.0", "drop", "50 %"} <= set(texts(picture))
    assert "layer1.1 drop" in picture.description


def test_blocks_with_other_candidates_are_aligned_by_name():
    rows = {"chain": {"50 %": 0.25, "100 %": 0.75}, "branch": {"drop": 0.5, "50 %": 0.5, "100 %": 0.0}}
    picture = sound(lambda: policy_map({3: rows}))
    drawn = picture.figure.axes[0].images[0].get_array()
    assert drawn.filled(-1).tolist() == [[-1, 0.25, 0.75], [0.5, 0.5, 0.0]]
    assert [tuple(p) for p in picture.figure.axes[0].collections[0].get_offsets()] == [(2, 0), (0, 1)]
    assert policy_map({3: rows}, ["drop", "50 %", "100 %"]).svg == picture.svg
    with pytest.raises(InputError, match="found no drop"):
        policy_map({3: rows}, ["50 %", "100 %"])
    with pytest.raises(InputError, match="found both"):
        policy_map({3: {"a": [1.0], "b": {"drop": 1.0}}})


def test_each_block_with_its_own_names():
    names = {"stem": ["25 %", "50 %", "100 %"], "branch": ["drop", "50 %", "100 %"], "only": ["100 %"]}
    rows = {"stem": [0.25, 0.5, 0.25], "branch": [0.5, 0.5, 0.0], "only": [1.0]}
    picture = sound(lambda: policy_map({3: rows}, names))
    axes = picture.figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["drop", "25 %", "50 %", "100 %"]
    assert axes.images[0].get_array().filled(-1).tolist() == [
        [-1, 0.25, 0.5, 0.25],
        [0.5, -1, 0.5, 0.0],
        [-1, -1, -1, 1.0],
    ]
    with pytest.raises(InputError, match="found none for 'only'"):
        policy_map({3: rows}, {k: v for k, v in names.items() if k != "only"})
    with pytest.raises(InputError, match="candidates of 'only': expected 1 values"):
        policy_map({3: rows}, {**names, "only": ["drop", "100 %"]})


def test_policy_map_of_one_block_and_of_many():
    sound(lambda: policy_map({"start": {"only": [1.0]}}))
    many = {f"block{i}": np.full(6, 1 / 6) for i in range(70)}
    picture = sound(lambda: policy_map(dict.fromkeys(range(6), many)))
    assert len(picture.figure.axes) == 8 + 1


@pytest.mark.parametrize(
    ("moments", "candidates", "message"),
    [
        ({}, None, "nothing to draw"),
        ({1: {}}, None, "nothing to draw"),
        ({1: {"a": []}}, None, "nothing to draw"),
        ({1: {"a": [0.5, 1.5]}}, None, r"probabilities in \[0, 1\]"),
        ({1: {"a": [1.0]}, 2: {"b": [1.0]}}, None, "expected the blocks"),
        ({1: {"a": [0.5, 0.5]}}, ["one"], "candidates: expected 2 values"),
        ({1: {"a": ["x"]}}, None, "expected numbers"),
        ([1, 2], None, "expected a mapping"),
    ],
)
def test_policy_maps_that_cannot_be_drawn(moments, candidates, message):
    with pytest.raises(InputError, match=message):
        policy_map(moments, candidates)


def test_costs_and_temperature():
    epochs, expected, likeliest, tau = [1, 2, 3], [0.9, 0.7, 0.52], [0.8, 0.4, 0.5], [5.0, 2.5, 0.1]
    picture = sound(lambda: policy_costs(epochs, expected, likeliest, 0.5, tau))
    left, right = picture.figure.axes
    first, second, target = left.lines
    assert first.get_xydata().tolist() == [list(pair) for pair in zip(epochs, expected, strict=True)]
    assert second.get_ydata().tolist() == likeliest
    assert list(target.get_ydata()) == [0.5, 0.5]
    assert right.lines[0].get_ydata().tolist() == tau
    assert {"expected", "likeliest network", "target, 50%", "temperature (right)"} <= set(texts(picture))
    assert "from 90.0% to 52.0%" in picture.description


def test_costs_of_one_epoch_without_temperature():
    picture = sound(lambda: policy_costs([1], [0.9], [0.8], 0.5))
    assert len(picture.figure.axes) == 1


def test_costs_of_different_lengths():
    with pytest.raises(InputError, match="likeliest network: expected 2 values"):
        policy_costs([1, 2], [0.9, 0.7], [0.5], 0.5)
    with pytest.raises(InputError, match="not finite"):
        policy_costs([1, 2], [0.9, float("nan")], [0.5, 0.5], 0.5)


def test_layer_attention_is_sorted_and_stretched():
    picture = sound(lambda: layer_attention({"a": [0.1, 0.9], "b": torch.tensor([0.3, 0.2, 0.5])}))
    rows = picture.figure.axes[0].images[0].get_array()
    assert rows[0].tolist() == [0.9] * 60 + [0.1] * 60
    assert np.unique(rows[1]).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert {"a  (2)", "b  (3)", "strongest", "weakest"} <= set(texts(picture))
    sound(lambda: layer_attention({"flat": [1.0]}))


def test_attention_between_layers():
    matrix = [[0.1, 0.3], [0.2, 0.2]]
    picture = sound(lambda: attention_between_layers(matrix, ["one", "two"]))
    assert picture.figure.axes[0].images[0].get_array().tolist() == matrix
    assert picture.figure.axes[0].images[0].get_clim() == (0.0, 0.3)
    assert texts(picture).count("0.20") >= 2
