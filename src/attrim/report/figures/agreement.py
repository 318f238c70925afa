"""How far rankings agree: between runs, with more data, and by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.canvas import COLOURS, INK, MARKERS, SMALL, Picture, finish, new_figure, shades, styled
from attrim.report.figures.check import FloatArray, filled, numbers, same_length
from attrim.report.figures.marks import band, grid, heat, label_rows, percent, thin, whole_numbers
from attrim.report.figures.stages import short_names

__all__ = ["agreement_by_epoch", "correlation_by_data", "depth_bar", "rank_correlation", "square"]


def rank_correlation(
    matrix: Any, names: Sequence[str], *, title: str = "Rank correlation of the scores", measure: str = "correlation"
) -> Picture:
    """A square of numbers: every run (seed, part of the data, layer) against every other.

    Args:
        matrix: shape ``(N, N)``; NaN where nothing was measured.
        names: of the rows and columns.
        title: heading.
        measure: what the numbers are.

    Raises:
        InputError: not square, or another number of names.

    Example:
        >>> rank_correlation([[1.0, 0.8], [0.8, 1.0]], ["seed 0", "seed 1"]).save("seeds.svg")
    """
    return square(matrix, names, title, measure)


def square(matrix: Any, names: Sequence[str], title: str, measure: str) -> Picture:
    """A square heat map with numbers where they are readable; see :func:`rank_correlation`."""
    table = numbers("matrix", matrix, 2, finite=False)
    if table.shape[0] != table.shape[1] or np.isinf(table).any() or np.isnan(table).all():
        raise InputError(f"matrix: expected a square of finite numbers (NaN: not measured), found shape {table.shape}.")
    same_length("names", names, "the rows", len(table))
    found = table[np.isfinite(table)]
    signed = found.min() < 0
    high = 1.0 if signed or found.max() > 0.5 else float(found.max()) or 1.0
    labels = [name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}" for name in map(str, names)]
    with styled():
        figure = new_figure(min(0.9 + max(0.17, 2.0 / len(table)) * len(table) + 0.065 * max(map(len, labels)), 9.5))
        axes = figure.subplots()
        image = heat(axes, table, low=-1.0 if signed else 0.0, high=high, colours="RdBu" if signed else "cividis")
        step = thin(len(labels), 48)
        level = max(map(len, labels)) * 5.2 < 440 / len(labels)
        axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=0 if level else 90)
        label_rows(axes, labels, 48)
        if len(table) <= 14:
            for (row, column), value in np.ndenumerate(table):
                dark = abs(value) > 0.6 if signed else value < 0.5 * high
                text = f"{value:.2f}" if np.isfinite(value) else ""
                colour = "white" if dark else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)
        figure.colorbar(image, ax=axes, label=measure, aspect=25)
        beside = table[~np.eye(len(table), dtype=bool)]
        rest = beside[np.isfinite(beside)]
        words = (
            f", from {rest.min():.2f} to {rest.max():.2f} beside the diagonal, mean {rest.mean():.2f}"
            if len(rest)
            else ""
        )
        return finish(figure, title, f"{measure.capitalize()} of {len(table)} with each other{words}.")


def correlation_by_data(
    fractions: Sequence[float],
    runs: Mapping[str, Any],
    *,
    title: str = "Rank correlation with the ranking of all data",
    measure: str = "rank correlation",
) -> Picture:
    """Lines over the share of the data that was read: the mean over seeds, lowest to highest as a band.

    Args:
        fractions: shape ``(F,)``, in (0, 1].
        runs: criterion (or layer) -> shape ``(seeds, F)``, or ``(F,)`` for one seed.
        title: heading.
        measure: what the numbers are.

    Raises:
        InputError: nothing to draw, or lengths that differ.

    Example:
        >>> correlation_by_data([0.1, 1.0], {"pcas": [[0.7, 1.0], [0.8, 1.0]]}).save("data.svg")
    """
    x = numbers("fractions", fractions)
    curves = {name: _runs(name, value) for name, value in filled("runs", runs).items()}
    with styled():
        figure = new_figure(3.3)
        axes = figure.subplots()
        for i, (name, curve) in enumerate(curves.items()):
            same_length(f"'{name}'", curve[0], "the fractions", len(x))
            band(axes, x, curve, colour=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=name)
        axes.set_xlabel("share of the data")
        axes.set_ylabel(measure)
        if x.min() > 0 and x.max() / x.min() > 20:
            axes.set_xscale("log")
        percent(axes.xaxis)
        if len(x) <= 10:
            axes.set_xticks(x)
            axes.minorticks_off()
        grid(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(curves), 5))
        words = "; ".join(
            f"{n}: {c.mean(0)[0]:.2f} at {x[0]:.0%}, {c.mean(0)[-1]:.2f} at {x[-1]:.0%}" for n, c in curves.items()
        )
        return finish(figure, title, f"Mean {measure} by share of the data. {words}.")


def _runs(name: str, value: Any) -> FloatArray:
    return numbers(f"'{name}'", value if np.ndim(value) == 2 else [value], 2)


def agreement_by_epoch(
    epochs: Sequence[Any],
    tau: Mapping[str, Sequence[float]],
    overlap: Mapping[str, Sequence[float]],
    *,
    title: str = "Agreement of the samples with the global order",
) -> Picture:
    """Kendall's tau and the overlap of the first channels by epoch: a thin line for each group, the mean in black.

    Args:
        epochs: shape ``(E,)``; numbers, or names of stages.
        tau: group -> shape ``(E,)``, in [-1, 1].
        overlap: group -> shape ``(E,)``, in [0, 1].
        title: heading.

    Raises:
        InputError: nothing to draw, lengths that differ, or other groups in ``overlap`` than in ``tau``.

    Example:
        >>> agreement_by_epoch([0, 1], {"conv1": [0.2, 0.6]}, {"conv1": [0.5, 0.8]}).save("agreement.svg")
    """
    if not len(epochs):
        raise InputError("epochs: nothing to draw; expected at least one.")
    if set(filled("tau", tau)) != set(overlap):
        raise InputError(f"expected the groups of tau ({', '.join(tau)}) in overlap, found {', '.join(overlap)}.")
    named = any(isinstance(epoch, str) for epoch in epochs)
    x = np.arange(len(epochs), dtype=float) if named else numbers("epochs", epochs)
    parts = {
        "Kendall's tau": {group: numbers(f"tau of '{group}'", v) for group, v in tau.items()},
        "overlap of the kept channels": {group: numbers(f"overlap of '{group}'", overlap[group]) for group in tau},
    }
    names, _ = short_names(list(tau), [""] * len(tau))
    with styled():
        figure = new_figure(3.7)
        words = []
        for axes, (what, curves) in zip(figure.subplots(1, 2), parts.items(), strict=True):
            for colour, (group, curve) in zip(shades(len(curves)), curves.items(), strict=True):
                same_length(f"{what} of '{group}'", curve, "the epochs", len(x))
                axes.plot(
                    x, curve, color=colour, linewidth=1.0, alpha=0.8, marker="o" if len(x) < 4 else "", markersize=3
                )
            mean = np.mean(list(curves.values()), axis=0)
            axes.plot(x, mean, color="#000000", linewidth=2.2, marker="o" if len(x) < 4 else "", label="mean")
            rose = sum(bool(c[-1] > c[0]) for c in curves.values())
            words.append(f"{what}: mean {mean[0]:.2f} to {mean[-1]:.2f}, rose in {rose} of {len(curves)} groups")
            axes.set_title(f"{what}; black: the mean")
            grid(axes)
            if named:
                axes.set_xticks(x, [str(epoch) for epoch in epochs], rotation=30, ha="right", rotation_mode="anchor")
            else:
                axes.set_xlabel("epoch")
                whole_numbers(axes.xaxis)
        depth_bar(figure, names)
        return finish(figure, title, "; ".join(words) + ".")


def depth_bar(figure: Any, names: list[str]) -> None:
    """Which colour is which group: the first and the last, and what lies between."""
    if len(names) < 2:
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(shades(len(names)))
    scale = ScalarMappable(Normalize(0, len(names)), colours)
    bar = figure.colorbar(scale, ax=figure.axes, aspect=30, pad=0.02)
    step = max(1, -(-len(names) // 12))
    bar.set_ticks([i + 0.5 for i in range(0, len(names), step)], labels=names[::step])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
