"""Marks that several figures share: heat maps with readable rows, lines with a band, axes in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attrim.report.figures.canvas import GRID, SMALL
from attrim.report.figures.check import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["band", "grid", "heat", "label_rows", "percent", "thin", "whole_numbers"]


def heat(axes: Axes, values: FloatArray, *, low: float, high: float, colours: str = "cividis") -> Any:
    """A matrix as an image, first row on top, one cell one unit; what is missing (NaN) stays light grey."""
    import matplotlib

    ramp = matplotlib.colormaps[colours].with_extremes(bad="#eeeeee")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    masked = np.ma.masked_invalid(values)
    return axes.imshow(masked, cmap=ramp, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def label_rows(axes: Axes, names: Sequence[str], most: int = 60) -> None:
    """Names at the rows; where there are too many, every second, third …"""
    step = thin(len(names), most)
    axes.set_yticks(range(0, len(names), step), names[::step])


def thin(count: int, most: int) -> int:
    """Every how many-th label is written."""
    return max(1, -(-count // most))


def band(axes: Axes, x: Any, runs: FloatArray, *, colour: Any, marker: str = "", label: str = "") -> None:
    """The mean over the runs, shape ``(runs, points)``, as a line, lowest to highest as a band."""
    axes.plot(x, runs.mean(0), color=colour, marker=marker, markersize=4, label=label)
    if len(runs) > 1:
        axes.fill_between(x, runs.min(0), runs.max(0), color=colour, alpha=0.18, linewidth=0)


def percent(axis: Any, digits: int = 0) -> None:
    """Fractions written as per cent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f} %"))


def whole_numbers(axis: Any) -> None:
    """Ticks of epochs and counts."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def grid(axes: Axes) -> None:
    """Faint horizontal lines, and room for small text."""
    axes.grid(visible=True, axis="y", color=GRID)
    axes.tick_params(labelsize=SMALL)
