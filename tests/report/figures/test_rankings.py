"""Attention, agreement of rankings and kept widths: the numbers drawn are the numbers given."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import heights, sound, texts

from attrim.errors import InputError
from attrim.report.figures import (
    agreement_by_epoch,
    attention_histograms,
    correlation_by_data,
    kept_by_layer,
    rank_correlation,
    score_spectra,
)

RANDOM = np.random.default_rng(0)


def test_histograms_count_every_channel():
    values = {f"layer{i}": RANDOM.uniform(0.5, 1.5, 16 * (i + 1)) for i in range(7)}
    picture = sound(lambda: attention_histograms(values, threshold=0.9))
    panels = [axes for axes in picture.figure.axes if axes.get_visible()]
    assert len(panels) == 7
    for axes, row in zip(panels, values.values(), strict=True):
        kept, removed = (np.nansum(patch.get_data().values) for patch in axes.patches)
        assert (kept, removed) == ((row >= 0.9).sum(), (row < 0.9).sum())
        assert axes.lines[0].get_xdata() == [0.9, 0.9]
    share = np.mean(np.concatenate(list(values.values())) < 0.9)
    assert f"{share:.1%} of all channels are below 0.9" in picture.description


def test_histograms_of_one_value_and_one_layer():
    picture = sound(lambda: attention_histograms({"conv1": [1.0]}))
    assert np.nansum(picture.figure.axes[0].patches[0].get_data().values) == 1
    sound(lambda: attention_histograms({"conv1": [1.0, 2.0]}, threshold=5.0))


def test_histograms_that_cannot_be_drawn():
    with pytest.raises(InputError, match="nothing to draw"):
        attention_histograms({})
    with pytest.raises(InputError, match="bins: expected an int >= 1, found 0"):
        attention_histograms({"a": [1.0]}, bins=0)
    with pytest.raises(InputError, match="at most 48"):
        attention_histograms({str(i): [1.0] for i in range(49)})


def test_rank_correlation_writes_its_numbers():
    matrix = [[1.0, 0.25, 0.5], [0.25, 1.0, 0.75], [0.5, 0.75, 1.0]]
    picture = sound(lambda: rank_correlation(matrix, ["seed 0", "seed 1", "10% of the data"]))
    assert picture.figure.axes[0].images[0].get_array().tolist() == matrix
    written = texts(picture)
    assert [written.count(t) for t in ("0.25", "0.50", "0.75", "1.00")] == [2, 2, 2, 3]
    assert "from 0.25 to 0.75 beside the diagonal, mean 0.50" in picture.description


def test_rank_correlation_below_zero_missing_and_large():
    picture = sound(lambda: rank_correlation([[1.0, -0.5], [np.nan, 1.0]], ["a", "b"]))
    assert picture.figure.axes[0].images[0].get_clim() == (-1.0, 1.0)
    sound(lambda: rank_correlation([[1.0]], ["alone"]))
    large = RANDOM.uniform(0, 1, (60, 60))
    sound(lambda: rank_correlation(large, [f"layer{i}.conv1" for i in range(60)]))


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([[1.0, 0.0]], ["a"], "expected a square"),
        ([[1.0]], ["a", "b"], "names: expected 1 values"),
        ([[np.nan]], ["a"], "finite"),
        ([], [], "2 dimension"),
    ],
)
def test_no_square(matrix, names, message):
    with pytest.raises(InputError, match=message):
        rank_correlation(matrix, names)


def test_correlation_by_data_is_the_mean_with_its_range():
    runs = {"pcas": [[0.5, 0.8, 1.0], [0.7, 0.9, 1.0]], "l1": [1.0, 1.0, 1.0]}
    picture = sound(lambda: correlation_by_data([0.1, 0.3, 1.0], runs))
    axes = picture.figure.axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.6, 0.85, 1.0])
    assert axes.lines[1].get_ydata().tolist() == [1.0] * 3
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.5, 1.0)
    sound(lambda: correlation_by_data([1.0], {"one": [0.5]}))
    with pytest.raises(InputError, match="'a': expected 2 values"):
        correlation_by_data([0.1, 1.0], {"a": [0.5]})


def test_agreement_draws_each_group_and_the_mean():
    tau = {"a": [0.1, 0.5], "b": [0.3, 0.2]}
    overlap = {"b": [0.5, 0.6], "a": [0.7, 0.9]}
    picture = sound(lambda: agreement_by_epoch([0, 5], tau, overlap))
    left, right = picture.figure.axes[:2]
    assert [line.get_ydata().tolist() for line in left.lines[:2]] == [[0.1, 0.5], [0.3, 0.2]]
    assert left.lines[2].get_ydata().tolist() == pytest.approx([0.2, 0.35])
    assert [line.get_ydata().tolist() for line in right.lines[:2]] == [[0.7, 0.9], [0.5, 0.6]]
    assert "mean 0.20 to 0.35, rose in 1 of 2 groups" in picture.description
    assert "rose in 2 of 2 groups" in picture.description


def test_agreement_by_stage_and_at_one_moment():
    picture = sound(lambda: agreement_by_epoch(["vote-0", "end"], {"a": [0.1, 0.2]}, {"a": [0.1, 0.2]}))
    assert {"vote-0", "end"} <= set(texts(picture))
    sound(lambda: agreement_by_epoch([3], {"a": [0.1]}, {"a": [0.4]}))


def test_agreement_that_does_not_fit():
    with pytest.raises(InputError, match="expected the groups of tau"):
        agreement_by_epoch([0], {"a": [0.1]}, {"b": [0.1]})
    with pytest.raises(InputError, match="at least one"):
        agreement_by_epoch([], {"a": []}, {"a": []})
    with pytest.raises(InputError, match="expected 2 values, one for each of the epochs; found 1"):
        agreement_by_epoch([0, 1], {"a": [0.1]}, {"a": [0.1]})


SIZES = {"layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer2.0.conv1": 32}


def test_kept_channels_with_the_range_over_seeds():
    kept = {
        "CIFAR-10": {"layer1.0.conv1": [8, 10], "layer1.1.conv1": [4, 4], "layer2.0.conv1": [20, 30]},
        "CIFAR-100": {"layer1.0.conv1": 12, "layer1.1.conv1": 13, "layer2.0.conv1": 14},
    }
    picture = sound(lambda: kept_by_layer(kept, SIZES))
    axes = picture.figure.axes[0]
    assert heights(axes, "full width") == [16, 16, 32]
    first, second = (c for c in axes.containers if c.get_label() in kept)
    assert first.lines[0].get_ydata().tolist() == [9, 4, 25]
    assert second.lines[0].get_ydata().tolist() == [12, 13, 14]
    bars = first.lines[2][0].get_segments()
    assert [(bar[0, 1], bar[1, 1]) for bar in bars] == [(8, 10), (4, 4), (20, 30)]
    assert "Of 64 channels in 3 layers are kept: CIFAR-10: 38; CIFAR-100: 39." in picture.description


def test_found_ratios():
    picture = sound(lambda: kept_by_layer({"bee": dict(zip(SIZES, (4, 8, 32), strict=True))}, SIZES, share=True))
    axes = picture.figure.axes[0]
    line = next(c for c in axes.containers if c.get_label() == "bee").lines[0]
    assert line.get_ydata().tolist() == [0.25, 0.5, 1.0]
    assert "100 %" in texts(picture)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({}, "nothing to draw"),
        ({"a": {"layer1.0.conv1": 4}}, "missing or unknown: layer1.1.conv1, layer2.0.conv1"),
        ({"a": dict.fromkeys(SIZES, 17)}, "'layer1.0.conv1' has 16 channels and keeps"),
        ({"a": {**SIZES, "layer1.0.conv1": [1, 2]}}, "one for each of the seeds"),
    ],
)
def test_kept_that_cannot_be_drawn(kept, message):
    with pytest.raises(InputError, match=message):
        kept_by_layer(kept, SIZES)


def test_spectra_are_sorted_and_logarithmic_where_they_must_be():
    raw = {"a": [0.001, 1.0, 0.1], "b": [0.0, 5.0, 0.5]}
    scaled = {"a": [0.2, 1.0, 0.5], "b": [0.3, 1.0, 0.6]}
    picture = sound(lambda: score_spectra(raw, scaled))
    left, right = picture.figure.axes[:2]
    assert left.get_yscale() == "log"
    assert [line.get_ydata().tolist() for line in left.lines] == [[1.0, 0.1, 0.001], [5.0, 0.5]]
    assert right.get_yscale() == "linear"
    assert right.lines[0].get_xydata().ravel().tolist() == pytest.approx([1 / 6, 1.0, 0.5, 0.5, 5 / 6, 0.2])


def test_scores_next_to_nothing_do_not_stretch_the_axis():
    picture = sound(lambda: score_spectra({"a": [1.0, 0.5, 1e-18, 0.0]}))
    assert picture.figure.axes[0].get_ylim()[0] == 1e-3
    assert "raw scores; below 1e-03: 50.0%" in texts(picture)


def test_spectra_of_wide_layers_are_thinned_and_keep_their_ends():
    picture = sound(lambda: score_spectra({f"layer{i}": np.arange(2048.0) for i in range(53)}))
    drawn = picture.figure.axes[0].lines[0].get_ydata()
    assert len(drawn) == 100
    assert (drawn[0], drawn[-1]) == (2047, 1)  # logarithmic: without the zero


def test_spectra_that_do_not_fit():
    sound(lambda: score_spectra({"one": [1.0]}))
    with pytest.raises(InputError, match="expected the layers of raw"):
        score_spectra({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(InputError, match="not finite"):
        score_spectra({"a": [1.0, float("inf")]})
