"""What different runs keep of each layer: two data sets, two searches, several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.canvas import COLOURS, LOST, MARKERS, Picture, finish, new_figure, styled
from attrim.report.figures.check import filled, same_length, seeds
from attrim.report.figures.marks import grid, percent, thin
from attrim.report.figures.stages import short_names, stages_of

__all__ = ["kept_by_layer"]


def kept_by_layer(
    kept: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    *,
    share: bool = False,
    title: str = "Kept channels of each layer",
) -> Picture:
    """A marker for each run and layer, with the range over seeds, in front of the full widths.

    Args:
        kept: run (data set, search) -> layer -> kept channels, or one number for each seed.
        sizes: layer -> full width, in network order.
        share: draw keep ratios instead of channels.
        title: heading.

    Raises:
        InputError: nothing to draw, a layer that is missing or unknown, or more kept than there are.

    Example:
        >>> kept_by_layer({"CIFAR-10": {"conv1": [9, 10]}, "CIFAR-100": {"conv1": [12, 13]}}, {"conv1": 16}).save("kept.svg")
    """
    layers = list(filled("sizes", sizes))
    full = np.array([float(sizes[layer]) for layer in layers])
    runs = {str(run): _by_layer(str(run), found, sizes) for run, found in filled("kept", kept).items()}
    unit = full if share else np.ones_like(full)
    names, prefix = short_names(layers, [""] * len(layers))
    with styled():
        figure = new_figure(2.9 + 0.065 * max(map(len, names)))
        axes = figure.subplots()
        x = np.arange(len(layers), dtype=float)
        axes.bar(x, full / unit, 0.86, color=LOST, label="full width")
        for i, (run, values) in enumerate(runs.items()):
            at = x + (i - (len(runs) - 1) / 2) * min(0.2, 0.7 / len(runs))
            middle = np.array([v.mean() for v in values]) / unit
            low = middle - np.array([v.min() for v in values]) / unit
            high = np.array([v.max() for v in values]) / unit - middle
            axes.errorbar(
                at, middle, np.maximum([low, high], 0), label=run, color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], markersize=4.5 if len(layers) < 40 else 3, elinewidth=1.2, linewidth=0.8, alpha=0.9,
            )  # fmt: skip
        _stage_lines(axes, sizes)
        step = thin(len(layers), 56)
        axes.set_xticks(x[::step], names[::step], rotation=90)
        axes.set_xlabel(f"of {prefix}" if prefix else "")
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.set_ylim(0, 1.04 * float((full / unit).max()))
        axes.set_ylabel("keep ratio" if share else "channels")
        if share:
            percent(axes.yaxis)
        grid(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs) + 1, 5))
        totals = "; ".join(f"{run}: {sum(v.mean() for v in values):,.0f}" for run, values in runs.items())
        return finish(figure, title, f"Of {full.sum():,.0f} channels in {len(layers)} layers are kept: {totals}.")


def _by_layer(run: str, found: Mapping[str, Any], sizes: Mapping[str, int]) -> list[Any]:
    if set(filled(f"'{run}'", found)) != set(sizes):
        odd = sorted(set(found) ^ set(sizes))
        raise InputError(f"'{run}': expected the layers of sizes; missing or unknown: {', '.join(map(str, odd[:4]))}.")
    values = [seeds(f"'{run}', layer '{layer}'", found[layer]) for layer in sizes]
    for layer, value in zip(sizes, values, strict=True):
        same_length(f"'{run}', layer '{layer}'", value, "the seeds", len(values[0]))
        if value.min() < 0 or value.max() > sizes[layer]:
            raise InputError(f"'{run}': layer '{layer}' has {sizes[layer]} channels and keeps {value.tolist()}.")
    return values


def _stage_lines(axes: Any, sizes: Mapping[str, int]) -> None:
    stages = stages_of(sizes)
    for i, (before, after) in enumerate(pairwise(stages)):
        if before != after:
            axes.axvline(i + 0.5, color="#999999", linewidth=0.7, linestyle=(0, (3, 3)))
