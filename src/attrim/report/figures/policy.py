"""A policy that is learned: probabilities of widths over time, costs against the target, attention of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.agreement import square
from attrim.report.figures.canvas import COLOURS, SMALL, Picture, finish, new_figure, styled
from attrim.report.figures.check import FloatArray, filled, numbers, same_length
from attrim.report.figures.marks import grid, heat, label_rows, percent, thin, whole_numbers
from attrim.report.figures.stages import short_names

__all__ = ["attention_between_layers", "layer_attention", "policy_costs", "policy_map"]

_ACROSS = 4
_COLUMNS = 120


def policy_map(
    moments: Mapping[Any, Mapping[str, Sequence[float] | Mapping[str, float]]],
    candidates: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    *,
    title: str = "Probability of each width",
) -> Picture:
    """Heat maps of blocks and candidates, one for each moment; a dot marks the likeliest candidate.

    Args:
        moments: epoch (or any name) -> block -> probabilities of its candidates, in [0, 1]; the same blocks each time.
            Either in order, or name of the candidate -> probability, where not all blocks have the same ones; what a
            block does not have is grey.
        candidates: names of all candidates in order, such as ``["drop", "25 %", "50 %", "100 %"]``; or block -> names of
            its own, as ``statistics["candidates"]`` of DCP-A; by default as the blocks name them, else their numbers
            from 1 on.
        title: heading.

    Raises:
        InputError: no moments or blocks, probabilities outside [0, 1], or blocks that differ.

    Example:
        >>> found = result.outcome.statistics
        >>> moments = {e["epoch"]: e["probabilities"] for e in found["epochs"][::10]}
        >>> policy_map(moments, found["candidates"]).save("policy.svg")
    """
    moments = filled("moments", moments)
    blocks = list(filled("the first moment", next(iter(moments.values()))))
    if isinstance(candidates, Mapping):
        moments, candidates = _named(moments, candidates)
    if any(isinstance(row, Mapping) for rows in moments.values() for row in rows.values()):
        moments, candidates = _in_order(moments, candidates)
    tables = [_table(str(name), rows, blocks) for name, rows in moments.items()]
    most = max(table.shape[1] for table in tables)
    tables = [np.pad(table, ((0, 0), (0, most - table.shape[1])), constant_values=np.nan) for table in tables]
    labels = [str(k + 1) for k in range(most)] if candidates is None else [str(c) for c in candidates]
    same_length("candidates", labels, "the columns", most)
    names, _ = short_names(blocks, [""] * len(blocks))
    rows, across = -(-len(tables) // _ACROSS), min(len(tables), _ACROSS)
    with styled():
        figure = new_figure(rows * (0.55 + 0.04 * max(map(len, labels)) + max(0.155 * min(len(blocks), 60), 0.9)) + 0.7)
        panels = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in panels[len(tables) :]:
            axes.set_visible(False)
        for axes, name, table in zip(panels, moments, tables, strict=False):
            image = heat(axes, table, low=0, high=1)
            best = np.nanargmax(table, axis=1)
            axes.scatter(
                best, range(len(blocks)), s=12, color="#d55e00", edgecolors="white", linewidths=0.6, label="likeliest"
            )
            axes.set_title(f"epoch {name}" if isinstance(name, int) else str(name))
            step = thin(most, 60 // across)
            axes.set_xticks(range(0, most, step), labels[::step], rotation=90 if max(map(len, labels)) > 3 else 0)
            axes.tick_params(labelbottom=True)
            label_rows(axes, names)
        figure.colorbar(image, ax=list(panels[: len(tables)]), label="probability", aspect=30, shrink=0.9)
        figure.supxlabel(
            "candidate width, the narrowest first" if candidates is None else "candidate width", fontsize=9
        )
        return finish(figure, title, _policy_words(moments, tables, blocks, labels))


def _named(
    moments: Mapping[Any, Mapping[str, Any]], names: Mapping[str, Sequence[str]]
) -> tuple[dict[Any, dict[str, dict[str, float]]], list[str]]:
    """Rows by name of the candidate, and all names in an order that is that of every block."""
    missing = [block for rows in moments.values() for block in rows if block not in names]
    if missing:
        raise InputError(f"candidates: expected names for every block, found none for '{missing[0]}'.")
    order: list[str] = []
    for own in sorted(names.values(), key=len, reverse=True):
        place = 0
        for name in own:
            if name not in order:
                order.insert(place, name)
            place = order.index(name) + 1
    named: dict[Any, dict[str, dict[str, float]]] = {}
    for moment, rows in moments.items():
        for block, row in rows.items():
            same_length(f"candidates of '{block}'", names[block], "its probabilities", len(row))
        named[moment] = {block: dict(zip(names[block], row, strict=True)) for block, row in rows.items()}
    return named, order


def _in_order(
    moments: Mapping[Any, Mapping[str, Any]], candidates: Sequence[str] | None
) -> tuple[dict[Any, dict[str, Any]], list[str]]:
    """Rows as lists in the order of the candidates, NaN for what a block does not have."""
    rows = [row for found in moments.values() for row in found.values()]
    if not all(isinstance(row, Mapping) for row in rows):
        raise InputError("moments: expected all blocks as lists, or all as candidate -> probability; found both.")
    order = list(candidates or dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    odd = {name for row in rows for name in row} - set(order)
    if odd:
        raise InputError(f"candidates: expected all that the blocks name, found no {', '.join(sorted(odd))}.")
    values = {
        moment: {block: [row.get(name, np.nan) for name in order] for block, row in found.items()}
        for moment, found in moments.items()
    }
    return values, order


def _table(moment: str, rows: Mapping[str, Any], blocks: list[str]) -> FloatArray:
    if list(rows) != blocks:
        raise InputError(f"moment '{moment}': expected the blocks {blocks[:3]}…, found {list(rows)[:3]}….")
    values = [numbers(f"moment '{moment}', block '{block}'", row, finite=False) for block, row in rows.items()]
    if any(np.isnan(v).all() or (v < -1e-6).any() or (v > 1 + 1e-6).any() for v in values):
        raise InputError(f"moment '{moment}': expected probabilities in [0, 1].")
    table = np.full((len(values), max(map(len, values))), np.nan)
    for row, value in zip(table, values, strict=True):
        row[: len(value)] = value
    return table


def _policy_words(moments: Mapping[Any, Any], tables: list[FloatArray], blocks: list[str], labels: list[str]) -> str:
    last = tables[-1]
    best = ", ".join(f"{block} {labels[k]}" for block, k in zip(blocks, np.nanargmax(last, axis=1), strict=True))
    sure = np.nanmax(last, axis=1).mean()
    when = list(moments)[-1]
    return f"Heat maps of {len(blocks)} blocks at {len(tables)} moments. At {when}, mean top probability {sure:.2f}: {best}."


def policy_costs(
    epochs: Sequence[float],
    expected: Sequence[float],
    likeliest: Sequence[float],
    target: float,
    temperature: Sequence[float] | None = None,
    *,
    resource: str = "MACs",
    title: str = "Cost of the policy while it is learned",
) -> Picture:
    """Expected cost and cost of the likeliest network by epoch, against the target; the temperature on a second axis.

    Args:
        epochs: shape ``(E,)``.
        expected, likeliest: shape ``(E,)``; fractions of the whole network's cost.
        target: the budget, the same fraction.
        temperature: shape ``(E,)``, of the softmax.
        resource: what the cost is.
        title: heading.

    Raises:
        InputError: nothing to draw, or lengths that differ.

    Example:
        >>> policy_costs([1, 2], [0.9, 0.6], [0.8, 0.5], 0.5, [5.0, 0.1]).save("costs.svg")
    """
    x = numbers("epochs", epochs)
    curves = {"expected": numbers("expected", expected), "likeliest network": numbers("likeliest", likeliest)}
    for name, curve in curves.items():
        same_length(name, curve, "the epochs", len(x))
    with styled():
        figure = new_figure(3.3)
        axes = figure.subplots()
        for (name, curve), colour, style in zip(curves.items(), COLOURS, ("-", (0, (5, 1.5))), strict=False):
            axes.plot(x, curve, color=colour, linestyle=style, marker="o" if len(x) < 3 else "", label=name)
        axes.axhline(target, color="#000000", linewidth=1.0, linestyle=":", label=f"target, {target:.0%}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"share of the {resource}")
        axes.set_ylim(0, 1.1 * max(float(target), *(float(curve.max()) for curve in curves.values())))
        whole_numbers(axes.xaxis)
        percent(axes.yaxis)
        grid(axes)
        handles = axes.get_legend_handles_labels()[0]
        if temperature is not None:
            warm = numbers("temperature", temperature)
            same_length("temperature", warm, "the epochs", len(x))
            other = axes.twinx()
            handles += other.plot(x, warm, color="#888888", linewidth=1.2, linestyle="-.", label="temperature (right)")
            other.set_ylabel("temperature", color="#555555")
            other.set_ylim(bottom=0)
            other.spines["right"].set_visible(True)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        words = (
            f"From epoch {x[0]:g} to {x[-1]:g} the expected {resource} go from {curves['expected'][0]:.1%} to "
            f"{curves['expected'][-1]:.1%}, those of the likeliest network from {curves['likeliest network'][0]:.1%} to "
            f"{curves['likeliest network'][-1]:.1%}; the target is {target:.1%}."
        )
        return finish(figure, title, words)


def attention_between_layers(
    matrix: Any, names: Sequence[str], *, title: str = "Which layer looks at which"
) -> Picture:
    """A square of attention weights: the row looks at the column.

    Args:
        matrix: shape ``(N, N)``; rows of a softmax.
        names: of the layers.
        title: heading.

    Raises:
        InputError: not square, or another number of names.

    Example:
        >>> attention_between_layers(explained["layers"], explained["names"]).save("layers.svg")
    """
    return square(matrix, names, title, "attention")


def layer_attention(
    attention: Mapping[str, Sequence[float]], *, title: str = "Attention of each layer, channels in order"
) -> Picture:
    """A row for each layer: the attention of its channels, strongest first, stretched to the same length.

    Args:
        attention: layer -> one number for each channel.
        title: heading.

    Raises:
        InputError: no layers, a layer without channels, or numbers that are not finite.

    Example:
        >>> layer_attention({"layer1.0.conv1": [0.9, 0.1, 0.4]}).save("attention.svg")
    """
    values = {name: numbers(f"layer '{name}'", row) for name, row in filled("attention", attention).items()}
    table = np.stack([_stretched(np.sort(row)[::-1], _COLUMNS) for row in values.values()])
    names, _ = short_names(list(values), [""] * len(values))
    low, high = float(table.min()), float(table.max())
    with styled():
        figure = new_figure(1.2 + 0.155 * max(min(len(values), 60), 4))
        axes = figure.subplots()
        image = heat(axes, table, low=low, high=high if high > low else low + 1)
        label_rows(axes, [f"{name}  ({len(row)})" for name, row in zip(names, values.values(), strict=True)])
        axes.set_xticks([-0.5, _COLUMNS / 2 - 0.5, _COLUMNS - 0.5], ["strongest", "median", "weakest"], fontsize=SMALL)
        figure.colorbar(image, ax=axes, label="attention", aspect=25)
        means = ", ".join(f"{name} {row.mean():.3g}" for name, row in values.items())
        return finish(figure, title, f"Sorted attention of {len(values)} layers; means: {means}.")


def _stretched(row: FloatArray, columns: int) -> FloatArray:
    return row[(np.arange(columns) * len(row)) // columns]
