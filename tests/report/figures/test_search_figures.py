"""Searches, objectives, tables as bars, and attention maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from drawn import sound, texts

from attrim.errors import InputError
from attrim.report.figures import attention_maps, grouped_bars, proxy_scatter, search_curves
from attrim.report.figures.maps import map_change
from attrim.report.figures.search import kendall_tau

INFINITY = math.inf


def test_curves_rise_where_the_best_does():
    runs = {"hill": [[-INFINITY, 0.5, 0.5, 0.5, 0.8], [0.4, 0.4, 0.6, 0.6, 0.6]], "random": [[0.3, 0.3, 0.5]]}
    picture = sound(lambda: search_curves(runs, levels={"uniform": 0.45}))
    hill, random, level = picture.figure.axes[0].lines
    assert hill.get_xydata().tolist() == [
        [2, pytest.approx(0.45)],
        [3, pytest.approx(0.55)],
        [5, pytest.approx(0.7)],
    ]
    assert random.get_xydata().tolist() == [[1, 0.3], [3, 0.5]]
    assert list(level.get_ydata()) == [0.45, 0.45]
    corners = picture.figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (0.4, 0.8)
    assert {"hill (2 seeds)", "random", "uniform"} <= set(texts(picture))
    assert "hill: 70.00% after 5 evaluations" in picture.description


def test_a_shorter_seed_keeps_its_last_value():
    picture = search_curves({"s": [[0.2, 0.4], [0.2, 0.2, 0.2, 0.6]]})
    assert picture.figure.axes[0].lines[0].get_ydata()[-1] == pytest.approx(0.5)


def test_long_curves_are_small_files():
    random = np.random.default_rng(0)
    runs = {
        name: [np.maximum.accumulate(random.normal(0.6, 0.1, 3000)) for _ in range(3)] for name in ("a", "b", "c", "d")
    }
    sound(lambda: search_curves(runs))
    sound(lambda: search_curves({"one": [[0.5]]}))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "nothing to draw"),
        ({"a": []}, "expected a list of curves"),
        ({"a": [0.1, 0.2]}, "expected a list of curves"),
        ({"a": [[0.5, 0.4]]}, "never falls"),
        ({"a": [[-INFINITY, -INFINITY]]}, "found at last"),
        ({"a": [[0.5, -INFINITY, 0.6]]}, "never falls"),
        ({"a": [[0.5, INFINITY]]}, "never falls"),
    ],
)
def test_curves_that_cannot_be_drawn(runs, message):
    with pytest.raises(InputError, match=message):
        search_curves(runs)


def test_kendall_tau():
    up = np.arange(6.0)
    assert kendall_tau(up, up) == 1
    assert kendall_tau(up, -up) == -1
    assert kendall_tau(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3])) == pytest.approx(4 / 6)
    assert kendall_tau(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(2 / math.sqrt(6))
    assert kendall_tau(np.ones(4), up[:4]) == 0
    assert kendall_tau(up[:1], up[:1]) == 0


def test_scatter_has_the_points_and_their_tau():
    points = {"recalibrated": ([0.1, 0.2, 0.3], [0.8, 0.9, 0.85]), "as cut": ([0.3, 0.2, 0.1], [0.8, 0.9, 0.95])}
    picture = sound(lambda: proxy_scatter(points))
    for axes, (x, y) in zip(picture.figure.axes, points.values(), strict=True):
        assert axes.collections[0].get_offsets().tolist() == [list(p) for p in zip(x, y, strict=True)]
    assert {"recalibrated: tau 0.33, 3 candidates", "as cut: tau -1.00, 3 candidates"} <= set(texts(picture))


def test_scatter_of_one_and_of_thousands():
    sound(lambda: proxy_scatter({"one": ([0.5], [0.5])}))
    x = np.linspace(0, 1, 1500)
    sound(lambda: proxy_scatter({"many": (x, x)}))
    with pytest.raises(InputError, match="expected 2 values, one for each of the candidates; found 1"):
        proxy_scatter({"a": ([1, 2], [1])})


TABLE = {
    "search": {"attention map": [0.913, 0.916, 0.911], "l1": [0.905, 0.911, 0.907]},
    "uniform": {"attention map": [0.897, 0.902, 0.899], "l1": [0.901, 0.900, 0.895]},
}


def test_bars_are_means_with_the_range_over_seeds():
    picture = sound(lambda: grouped_bars(TABLE))
    axes = picture.figure.axes[0]
    bars = {c.get_label(): c for c in axes.containers if c.get_label() in TABLE["search"]}
    for kind, container in bars.items():
        tops = [bar.get_y() + bar.get_height() for bar in container]
        assert tops == pytest.approx([np.mean(row[kind]) for row in TABLE.values()])
        ends = [tuple(segment[:, 1]) for segment in container.errorbar.lines[2][0].get_segments()]
        assert ends == [pytest.approx((min(row[kind]), max(row[kind]))) for row in TABLE.values()]
    dots = sorted(y for c in axes.collections for _, y in c.get_offsets() if len(c.get_offsets()) == 3)
    assert dots == pytest.approx(sorted(v for row in TABLE.values() for values in row.values() for v in values))
    assert {"91.33 %", "90.77 %", "search", "uniform", "attention map", "l1"} <= set(texts(picture))
    assert any("the axis begins at" in text for text in texts(picture))
    assert 0 < axes.get_ylim()[0] < 0.895


def test_bars_from_zero():
    axes = grouped_bars(TABLE, from_zero=True).figure.axes[0]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylabel() == "accuracy"
    plain = sound(lambda: grouped_bars({"a": {"x": 3.0}, "b": {"x": 7.0}}, value="seconds", as_percent=False))
    assert plain.figure.axes[0].get_ylim()[0] == 0
    assert {"3", "7"} <= set(texts(plain))
    sound(lambda: grouped_bars({"a": {"x": 0.5}}))


def test_bars_that_do_not_fit():
    with pytest.raises(InputError, match="'b': expected the kinds x; found y"):
        grouped_bars({"a": {"x": 1.0}, "b": {"y": 1.0}})
    with pytest.raises(InputError, match="nothing to draw"):
        grouped_bars({})


def test_maps_and_their_change():
    whole = np.zeros((2, 2, 2))
    whole[:, 0, 0] = (1.0, 3.0)
    other = np.zeros((2, 2, 2))
    other[0, 0, 0], other[1, 1, 1] = 2.0, 1.0
    assert map_change(whole, other).tolist() == pytest.approx([0.0, math.sqrt(2)])
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3))
    columns = {"without the lowest": other, "without the highest": whole[:, ::-1]}
    picture = sound(lambda: attention_maps(images, whole, columns))
    panels = np.reshape(picture.figure.axes, (2, 4))
    for row in range(2):
        drawn = [axes.images[0].get_array() for axes in panels[row]]
        assert np.allclose(drawn[0], (images[row] - images[row].min()) / np.ptp(images[row]))
        assert drawn[1].tolist() == whole[row].tolist()
        assert drawn[2].tolist() == other[row].tolist()
    assert {"0.00", "1.41"} <= set(texts(picture))
    assert "without the lowest 0.71, without the highest 1.41" in picture.description


def test_grey_images_and_empty_maps():
    zeros = np.zeros((2, 2, 2))
    picture = sound(lambda: attention_maps(np.ones((2, 4, 4)), zeros, {"without all": zeros}))
    assert [axes.images[0].get_cmap().name for axes in picture.figure.axes] == ["gray", "inferno", "inferno"] * 2


def test_large_images_are_averaged():
    random = np.random.default_rng(0)
    images, map_ = random.uniform(size=(5, 200, 224, 3)), random.uniform(size=(5, 14, 14))
    picture = sound(lambda: attention_maps(images, map_, {"without all": map_}))
    drawn = picture.figure.axes[0].images[0].get_array()
    assert drawn.shape == (50, 56, 3)
    block = images[0, :4, :4].mean((0, 1))
    blocks = images[0].reshape(50, 4, 56, 4, 3).mean((1, 3))
    assert drawn[0, 0].tolist() == pytest.approx(((block - blocks.min()) / np.ptp(blocks)).tolist())


@pytest.mark.parametrize(
    ("images", "whole", "without", "message"),
    [
        (np.ones((1, 4, 4, 2)), np.ones((1, 2, 2)), {}, r"expected the shape \(N, H, W, 3\)"),
        (np.ones((1, 4, 4, 3)), np.ones((2, 2, 2)), {}, "expected 1 maps"),
        (np.ones((1, 4, 4, 3)), np.ones((1, 2, 2)), {}, "nothing to draw"),
        (np.ones((1, 4, 4, 3)), np.ones((1, 2, 2)), {"x": np.ones((1, 3, 3))}, r"expected the shape \(1, 2, 2\)"),
        (np.ones((1, 4, 4, 3)), -np.ones((1, 2, 2)), {"x": np.ones((1, 2, 2))}, "not negative"),
        (np.ones((9, 4, 4, 3)), np.ones((9, 2, 2)), {"x": np.ones((9, 2, 2))}, "at most 8"),
    ],
)
def test_maps_that_cannot_be_drawn(images, whole, without, message):
    with pytest.raises(InputError, match=message):
        attention_maps(images, whole, without)
