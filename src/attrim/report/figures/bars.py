"""Groups of bars with the spread over seeds: two ways to rank against two ways to choose ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.canvas import COLOURS, INK, SMALL, Picture, finish, new_figure, styled
from attrim.report.figures.check import FloatArray, filled, seeds
from attrim.report.figures.marks import grid, percent

__all__ = ["grouped_bars"]

_HATCHES = ("", "//", "\\\\", "xx", "--", "||", "++")


def grouped_bars(
    table: Mapping[str, Mapping[str, Any]],
    *,
    value: str = "accuracy",
    as_percent: bool = True,
    from_zero: bool = False,
    title: str = "Accuracy at equal cost",
) -> Picture:
    """Bars of means with lowest and highest seed as error bars, every seed as a dot, the mean above.

    Args:
        table: group on the axis (``search``, ``uniform``) -> kind of bar (``attention map``, ``l1``) -> a number, or one
            for each seed. The same kinds in each group.
        value: what the bars are.
        as_percent: write fractions as per cent.
        from_zero: let the axis begin at 0; otherwise it begins a little below the lowest seed, and says so.
        title: heading.

    Raises:
        InputError: nothing to draw, or groups with other kinds.

    Example:
        >>> grouped_bars({"search": {"attention map": [0.91, 0.92], "l1": [0.90, 0.91]},
        ...               "uniform": {"attention map": [0.88, 0.90], "l1": [0.89, 0.89]}}).save("2x2.svg")
    """
    groups = list(filled("table", table))
    kinds = list(filled(f"'{groups[0]}'", table[groups[0]]))
    for group in groups:
        if set(table[group]) != set(kinds):
            raise InputError(f"'{group}': expected the kinds {', '.join(kinds)}; found {', '.join(table[group])}.")
    cells = {k: [seeds(f"'{group}', '{k}'", table[group][k]) for group in groups] for k in kinds}
    every = np.concatenate([row for rows in cells.values() for row in rows])
    floor = 0.0 if from_zero else _below(float(every.min()), float(every.max()))
    width = 0.8 / len(kinds)
    with styled():
        figure = new_figure(3.6)
        axes = figure.subplots()
        for i, (kind, rows) in enumerate(cells.items()):
            at = np.arange(len(groups), dtype=np.float64) + (i - (len(kinds) - 1) / 2) * width
            _draw(axes, at, rows, width, floor, i, kind, as_percent)
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(floor, None)
        axes.margins(y=0.14)
        mark = (f"{100 * floor:g} %" if as_percent else f"{floor:g}") if floor else ""
        axes.set_ylabel(f"{value}\n(the axis begins at {mark})" if mark else value)
        if as_percent:
            percent(axes.yaxis, 0 if every.max() - floor > 0.05 else 1)
        grid(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(kinds), 5))
        number = ".2%" if as_percent else ".4g"
        words = "; ".join(
            f"{group}, {kind}: {row.mean():{number}}"
            + (f" ({row.min():{number}} to {row.max():{number}}, {len(row)} seeds)" if len(row) > 1 else "")
            for kind, rows in cells.items()
            for group, row in zip(groups, rows, strict=True)
        )
        return finish(figure, title, f"{value.capitalize()} of {len(groups)} x {len(kinds)}. {words}.")


def _draw(
    axes: Any, at: Any, rows: list[FloatArray], width: float, floor: float, i: int, kind: str, as_percent: bool
) -> None:
    means = np.array([row.mean() for row in rows])
    low = means - np.array([row.min() for row in rows])
    high = np.array([row.max() for row in rows]) - means
    spread = np.maximum([low, high], 0) if any(len(row) > 1 for row in rows) else None
    axes.bar(
        at, means - floor, width * 0.92, bottom=floor, color=COLOURS[i % len(COLOURS)], alpha=0.75, yerr=spread, capsize=3,
        error_kw={"ecolor": INK, "elinewidth": 1.0}, hatch=_HATCHES[i % len(_HATCHES)], edgecolor="white", linewidth=0, label=kind,
    )  # fmt: skip
    for x, row, mean in zip(at, rows, means, strict=True):
        if len(row) > 1:
            beside = x + np.linspace(-0.2, 0.2, len(row)) * width
            axes.scatter(beside, row, s=10, color=INK, zorder=3, linewidths=0)
        text = f"{100 * mean:.2f} %" if as_percent else f"{mean:.3g}"
        axes.annotate(
            text, (x, float(row.max())), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=SMALL
        )


def _below(low: float, high: float) -> float:
    """A round number below the lowest value, or 0 where the values differ much or are not positive."""
    spread = high - low
    if low <= 0 or spread > 0.5 * high:
        return 0.0
    step = 10.0 ** math.floor(math.log10(max(spread, 0.02 * high)))
    return max(0.0, round(step * math.floor((low - 0.6 * max(spread, 0.02 * high)) / step), 12))
