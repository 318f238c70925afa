"""Spectra of scores: the channels of each layer from the best to the worst, raw and scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.agreement import depth_bar
from attrim.report.figures.canvas import Picture, finish, new_figure, shades, styled
from attrim.report.figures.check import FloatArray, filled, numbers
from attrim.report.figures.marks import grid, percent
from attrim.report.figures.stages import short_names

__all__ = ["score_spectra"]

_SPAN = 1e3

_POINTS = 100
"""Of a layer with more channels every second, third … is drawn, the first and the last always."""


def score_spectra(
    raw: Mapping[str, Any],
    scaled: Mapping[str, Any] | None = None,
    *,
    title: str = "Scores of the channels in each layer",
) -> Picture:
    """A line for each layer, channels from the highest score to the lowest; the raw scores, and beside them the scaled ones.

    Args:
        raw: layer -> one score for each channel. Drawn on a logarithmic axis where they span more than two decades, down to
            a thousandth of the highest; the title says how many score less.
        scaled: the same layers after the normalisation that makes them comparable.
        title: heading.

    Raises:
        InputError: no layers, other layers in ``scaled``, or numbers that are not finite.

    Example:
        >>> score_spectra(raw.values, scaled.values).save("spectra.svg")
    """
    parts = {"raw": {n: numbers(f"layer '{n}'", v) for n, v in filled("raw", raw).items()}}
    if scaled is not None:
        if set(scaled) != set(raw):
            raise InputError(f"scaled: expected the layers of raw ({len(raw)}), found {len(scaled)} others.")
        parts["scaled"] = {n: numbers(f"scaled layer '{n}'", scaled[n]) for n in raw}
    names, _ = short_names(list(raw), [""] * len(raw))
    with styled():
        figure = new_figure(3.7)
        words = []
        for axes, (what, layers) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
            positive = np.concatenate(list(layers.values()))
            positive = positive[positive > 0]
            logarithmic = len(positive) > 0 and positive.max() > 100 * positive.min()
            for colour, row in zip(shades(len(layers)), layers.values(), strict=True):
                x, y = _spectrum(row, logarithmic)
                axes.plot(x, y, color=colour, linewidth=1.2, marker="o" if len(y) == 1 else "", markersize=3)
            note = ""
            if logarithmic:
                axes.set_yscale("log")
                floor = float(positive.max()) / _SPAN
                if positive.min() < floor:
                    axes.set_ylim(floor, 1.5 * float(positive.max()))
                    note = f"; below {floor:.0e}: {np.mean([v < floor for r in layers.values() for v in r]):.1%}"
            axes.set_title(f"{what} scores{note}")
            axes.set_xlabel("channels, the best first")
            percent(axes.xaxis)
            grid(axes)
            means = np.array([row.mean() for row in layers.values()])
            words.append(f"{what}: means of the layers from {means.min():.3g} to {means.max():.3g}")
        depth_bar(figure, names)
        return finish(figure, title, f"Sorted scores of {len(raw)} layers. {'; '.join(words)}.")


def _spectrum(row: FloatArray, positive: bool) -> tuple[FloatArray, FloatArray]:
    ordered = np.sort(row)[::-1]
    x = (np.arange(len(ordered)) + 0.5) / len(ordered)
    stay = ordered > 0 if positive else np.ones(len(ordered), bool)
    x, ordered = x[stay], ordered[stay]
    few = np.unique(np.linspace(0, len(x) - 1, _POINTS).round().astype(int)) if len(x) > _POINTS else slice(None)
    return x[few], ordered[few]
