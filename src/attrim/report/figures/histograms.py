"""Histograms of the attention, a panel for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.canvas import CUT, KEPT, LOST, Picture, finish, new_figure, styled
from attrim.report.figures.check import FloatArray, filled, numbers
from attrim.report.figures.stages import short_names

__all__ = ["attention_histograms"]

_ACROSS, _MOST = 5, 48


def attention_histograms(
    attention: Mapping[str, Any],
    *,
    threshold: float | None = None,
    bins: int = 24,
    title: str = "Attention of the channels in each layer",
) -> Picture:
    """How many channels of each layer have how much attention, on one axis for all; what lies below the threshold is grey.

    Args:
        attention: layer -> one number for each channel.
        threshold: where the cut is; channels below go.
        bins: number of bars, over the range of all layers.
        title: heading.

    Raises:
        InputError: no layers or more than 48, a layer without channels, numbers that are not finite, or ``bins`` < 1.

    Example:
        >>> attention_histograms({g: v for g, v in scores.values.items()}, threshold=0.9).save("attention.svg")
    """
    values = {name: numbers(f"layer '{name}'", row) for name, row in filled("attention", attention).items()}
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"bins: expected an int >= 1, found {bins!r}.")
    if len(values) > _MOST:
        raise InputError(
            f"attention: {len(values)} layers; at most {_MOST} panels are readable. Pass some of them, or draw layer_attention."
        )
    all_of_them = np.concatenate(list(values.values()))
    edges = _edges(all_of_them, bins, threshold)
    names, _ = short_names(list(values), [""] * len(values), 20)
    across = min(_ACROSS, len(values))
    rows = -(-len(values) // across)
    with styled():
        figure = new_figure(0.9 + 1.15 * rows)
        panels = figure.subplots(rows, across, sharex=True, squeeze=False)
        for axes in panels.ravel()[len(values) :]:
            axes.set_visible(False)
        for axes, name, row in zip(panels.ravel(), names, values.values(), strict=False):
            counts, _ = np.histogram(row, edges)
            gone = np.zeros(len(counts), bool) if threshold is None else edges[1:] <= threshold
            axes.stairs(np.where(gone, 0, counts), edges, fill=True, color=KEPT, label="kept")
            if gone.any():
                axes.stairs(np.where(gone, counts, 0), edges, fill=True, color=LOST, label="removed")
            axes.set_title(f"{name}  ({len(row)})", fontsize=8)
            axes.spines["left"].set_visible(False)
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=3)
            axes.tick_params(axis="x", labelbottom=True)
            if threshold is not None:
                axes.axvline(threshold, color=CUT, linewidth=1.0)
        figure.supxlabel(
            "attention" if threshold is None else f"attention; the line is the cut at {threshold:.3g}", fontsize=9
        )
        below = (
            ""
            if threshold is None
            else f"; {np.mean(all_of_them < threshold):.1%} of all channels are below {threshold:.3g}"
        )
        words = ", ".join(f"{name} {row.mean():.3g} ± {row.std():.2g}" for name, row in values.items())
        return finish(figure, title, f"Histograms of {len(values)} layers{below}. Mean and deviation: {words}.")


def _edges(values: FloatArray, bins: int, threshold: float | None) -> FloatArray:
    """Edges of the bars; the threshold is one of them, so that no bar is half removed."""
    edges = np.histogram_bin_edges(values, bins)
    if threshold is None or not edges[0] < threshold < edges[-1]:
        return edges
    width = edges[1] - edges[0]
    below, above = math.ceil((threshold - edges[0]) / width), math.ceil((edges[-1] - threshold) / width)
    return np.asarray(threshold + width * np.arange(-below, above + 1), dtype=np.float64)
