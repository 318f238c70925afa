"""Searches: the best value found so far, and how far the objective foretells the accuracy after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.canvas import COLOURS, MARKERS, SMALL, Picture, finish, new_figure, styled
from attrim.report.figures.check import FloatArray, filled, numbers, same_length
from attrim.report.figures.marks import grid, percent

__all__ = ["kendall_tau", "proxy_scatter", "search_curves"]

_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def search_curves(
    runs: Mapping[str, Sequence[Sequence[float]]],
    *,
    levels: Mapping[str, float] | None = None,
    value: str = "accuracy on held-out images",
    as_percent: bool = True,
    title: str = "Best candidate so far",
) -> Picture:
    """The best value against evaluations: for each search the mean over seeds, lowest to highest as a band.

    Args:
        runs: search -> one curve for each seed; entry ``i`` is the best value after ``i + 1`` evaluations, ``-inf`` before
            the first candidate within the budget. A shorter curve ended early and keeps its last value.
        levels: name -> value of what needs no search (``uniform``), as dotted lines.
        value: what was searched for.
        as_percent: write fractions as per cent.
        title: heading.

    Raises:
        InputError: nothing to draw, or a curve that falls.

    Example:
        >>> search_curves({"neighbourhood": [found.curve for found in runs]}, levels={"uniform": 0.71}).save("search.svg")
    """
    curves = {str(name): _aligned(str(name), found) for name, found in filled("runs", runs).items()}
    with styled():
        figure = new_figure(3.5)
        axes = figure.subplots()
        for i, (name, table) in enumerate(curves.items()):
            x = np.arange(1, table.shape[1] + 1)
            corners = _corners(table)
            colour, rows, at = COLOURS[i % len(COLOURS)], table[:, corners], x[corners]
            axes.step(
                at, rows.mean(0), where="post", color=colour, linestyle=_DASHES[i % len(_DASHES)],
                label=f"{name}" + (f" ({len(table)} seeds)" if len(table) > 1 else ""), marker="o" if len(at) == 1 else "",
            )  # fmt: skip
            if len(table) > 1:
                axes.fill_between(at, rows.min(0), rows.max(0), step="post", color=colour, alpha=0.15, linewidth=0)
        for name, level in (levels or {}).items():
            axes.axhline(level, color="#555555", linewidth=1.0, linestyle=":")
            axes.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), xytext=(-2, 2),
                          textcoords="offset points", ha="right", fontsize=SMALL, color="#555555")  # fmt: skip
        axes.set_xlabel("evaluations")
        axes.set_ylabel(value)
        if as_percent:
            percent(axes.yaxis, 1)
        grid(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(curves), 4))
        digits = ".2%" if as_percent else ".4g"
        ends = "; ".join(f"{n}: {t[:, -1].mean():{digits}} after {t.shape[1]} evaluations" for n, t in curves.items())
        return finish(figure, title, f"Best {value} so far, mean over seeds. {ends}.")


def _aligned(name: str, found: Sequence[Sequence[float]]) -> FloatArray:
    if not len(found) or np.ndim(found[0]) != 1:
        raise InputError(f"'{name}': expected a list of curves, one for each seed.")
    curves = [numbers(f"'{name}', seed {i}", curve, finite=False) for i, curve in enumerate(found)]
    for i, curve in enumerate(curves):
        begun = int(np.isfinite(curve).argmax())
        rest = curve[begun:]
        if not np.isneginf(curve[:begun]).all() or not np.isfinite(rest).all() or (np.diff(rest) < 0).any():
            raise InputError(
                f"'{name}', seed {i}: expected the best value so far, which is found at last and never falls. Of single values "
                "make it with numpy.maximum.accumulate."
            )
    longest = max(map(len, curves))
    return np.stack([np.pad(curve, (0, longest - len(curve)), mode="edge") for curve in curves])


def _corners(table: FloatArray) -> Any:
    """Columns where a curve rises, and both ends, once all have begun; nothing in between is lost."""
    begun = np.isfinite(table).all(0)
    first = int(begun.argmax())
    rises = np.zeros(table.shape[1], bool)
    rises[first + 1 :] = (np.diff(table[:, first:], axis=1) > 0).any(0)
    rises[[first, -1]] = True
    return np.flatnonzero(rises)


def proxy_scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    proxy: str = "objective of the search",
    tuned: str = "accuracy after fine-tuning",
    title: str = "Does the objective foretell the accuracy?",
) -> Picture:
    """The objective against the fine-tuned accuracy of the same candidates, with Kendall's tau for each objective.

    Args:
        points: objective -> (its values, accuracies), each of shape ``(N,)``; fractions. Up to three panels side by side.
        proxy, tuned: what the axes are.
        title: heading.

    Raises:
        InputError: nothing to draw, or lengths that differ.

    Example:
        >>> proxy_scatter({"recalibrated": (values, accuracies)}).save("proxy.svg")
    """
    pairs: dict[str, tuple[FloatArray, FloatArray]] = {}
    for name, (values, accuracies) in filled("points", points).items():
        pairs[str(name)] = (numbers(f"'{name}'", values), numbers(f"accuracies of '{name}'", accuracies))
        same_length(f"accuracies of '{name}'", pairs[str(name)][1], "the candidates", len(pairs[str(name)][0]))
    across = min(len(pairs), 3)
    rows = -(-len(pairs) // across)
    with styled():
        figure = new_figure(3.0 * rows + 0.6)
        panels = figure.subplots(rows, across, sharey=True, squeeze=False).ravel()
        for axes in panels[len(pairs) :]:
            axes.set_visible(False)
        taus = {}
        for i, (axes, (name, (x, y))) in enumerate(zip(panels, pairs.items(), strict=False)):
            taus[name] = kendall_tau(x, y)
            dots = axes.scatter(
                x, y, s=22, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], alpha=0.75, linewidths=0
            )
            dots.set_rasterized(len(x) > 1000)
            axes.set_title(
                f"{name}: tau {taus[name]:.2f}, {len(x)} candidates" if len(x) > 1 else f"{name}: one candidate"
            )
            axes.set_xlabel(proxy)
            percent(axes.xaxis)
            percent(axes.yaxis)
            axes.locator_params(axis="x", nbins=5)
            grid(axes)
        for axes in panels[::across]:
            axes.set_ylabel(tuned)
        words = "; ".join(f"{name} {tau:.2f} over {len(pairs[name][0])} candidates" for name, tau in taus.items())
        return finish(figure, title, f"{proxy.capitalize()} against {tuned}; Kendall's tau: {words}.")


def kendall_tau(x: FloatArray, y: FloatArray) -> float:
    """Kendall's tau-b of two lists, in [-1, 1]; 0 where one of them is constant or has a single entry.

    Source: Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945.

    Example:
        >>> kendall_tau(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]))
        0.3333333333333333
    """
    above = np.triu_indices(len(x), 1)
    a, b = (np.sign(v[:, None] - v[None, :])[above] for v in (x, y))
    pairs = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / pairs if pairs else 0.0
