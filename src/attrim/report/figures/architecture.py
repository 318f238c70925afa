"""The architecture after a cut: a bar for each group of channels, full against kept width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.errors import InputError
from attrim.report.figures.canvas import CUT, KEPT, LOST, SMALL, Picture, finish, new_figure, styled
from attrim.report.figures.stages import short_names, stages_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["architecture"]

_SHARE_FROM = 16
"""Widest over narrowest group from which bars of channels would hide the narrow ones."""

_MOST_LABELS, _MOST_NUMBERS = 54, 30


@dataclass(frozen=True, slots=True)
class _Row:
    """One network: its name, what is said of it, and the width that each group keeps (0: dropped)."""

    name: str
    note: str
    kept: Mapping[str, int]


def architecture(
    channels: ChannelMap | None,
    plans: PruningPlan | Mapping[str, Any],
    *,
    stages: Mapping[str, str] | None = None,
    scale: str = "auto",
    title: str = "Kept width of each group of channels",
) -> Picture:
    """Bars of full and kept width, group by group in network order, dropped blocks hatched, stages apart.

    Works for chains, residual networks and transformers alike: a bar is a group of tied channels, be it the inner width of
    a block, a residual stream, or the heads of an attention layer.

    Args:
        channels: the traced network; None takes order and sizes from the plan.
        plans: one plan; or name -> plan, drawn below each other for comparison; or kept counts in place of a plan:
            group -> kept, or group -> ``(size, kept)`` where ``channels`` is None. Groups that are not named stay whole.
        stages: group -> name of its stage; by default read from module paths, sizes of the maps, or widths.
        scale: height of a bar in ``channels``, or as a ``share`` of the full width; ``auto`` takes the share where the
            widest group has more than 16 times the channels of the narrowest.
        title: heading.

    Raises:
        InputError: no groups, a group or a size that does not fit, an unknown scale.

    Example:
        >>> attrim.report.architecture(channels, {"uniform": plan_a, "searched": plan_b}).save("architecture.svg")
    """
    if scale not in ("auto", "channels", "share"):
        raise InputError(f"scale: expected 'auto', 'channels' or 'share', found {scale!r}.")
    sizes, rows = _read(channels, plans)
    wide = max(sizes.values()) > _SHARE_FROM * min(sizes.values())
    share = scale == "share" or (scale == "auto" and wide)
    names = stages_of(sizes, channels) if stages is None else [str(stages.get(group, "")) for group in sizes]
    at = _positions(names)
    with styled():
        labels, prefix = short_names(list(sizes), names)
        figure = new_figure((2.1 if share else 1.75) * len(rows) + 0.95 + 0.065 * max(map(len, labels)))
        panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, row in zip(panels, rows, strict=True):
            _draw(axes, row, sizes, at, names, share)
        _name_stages(panels[0], names, at)
        step = -(-len(labels) // _MOST_LABELS)
        panels[-1].set_xticks(at[::step], labels[::step], rotation=90)
        panels[-1].set_xlabel(f"of {prefix}" if prefix else "")
        _legend(figure, any(not k for row in rows for k in row.kept.values()))
        return finish(figure, title, _words(sizes, rows))


def _read(channels: ChannelMap | None, plans: Any) -> tuple[dict[str, int], list[_Row]]:
    """Sizes in network order, and the rows."""
    several = isinstance(plans, Mapping) and any(isinstance(p, PruningPlan | Mapping) for p in plans.values())
    given: Mapping[str, Any] = plans if several else {"": plans}
    sizes = {} if channels is None else {group.id: group.size for group in channels}
    rows: list[_Row] = []
    for name, plan in given.items():
        found = _entries(name, plan, sizes)
        if not rows and channels is None:
            sizes = {group: size for group, (size, _) in found.items()}
        for group, (size, kept) in found.items():
            if sizes.get(group) != size:
                raise InputError(
                    f"{_what(name)}: group '{group}' has {size} channels; the network beside it has "
                    f"{sizes.get(group, 'no such group')}. Draw networks of one architecture in one picture."
                )
            if not 0 <= kept <= size:
                raise InputError(f"{_what(name)}: group '{group}' keeps {kept} of its {size} channels.")
        counts = {group: found.get(group, (size, size))[1] for group, size in sizes.items()}
        known = plan.provenance if isinstance(plan, PruningPlan) else _priced(channels, counts)
        rows.append(_Row(str(name), _note(known, sizes, counts), counts))
    if not sizes:
        raise InputError("there is no group of channels to draw: the plan (or the channel map) has none.")
    return sizes, rows


def _entries(name: str, plan: Any, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Group -> (size, kept) as a plan or a mapping says."""
    if isinstance(plan, PruningPlan):
        return {
            group: (int(entry["size"]), int(entry["kept"]))
            for group, entry in plan.groups.items()
            if isinstance(entry, Mapping) and {"size", "kept"} <= set(entry)
        }
    if not isinstance(plan, Mapping):
        raise InputError(f"{_what(name)}: expected a PruningPlan or kept counts, found {type(plan).__name__}.")
    found = {}
    for group, value in plan.items():
        pair = tuple(value) if np.ndim(value) else (sizes.get(group), value)
        if len(pair) != 2 or pair[0] is None:
            raise InputError(
                f"{_what(name)}: the size of group '{group}' is not known. Pass channels=attrim.trace(...), or "
                f"(size, kept) for each group; found {value!r}."
            )
        found[str(group)] = (int(pair[0]), int(pair[1]))
    return found


def _what(name: str) -> str:
    return f"plan '{name}'" if name else "the plan"


def _priced(channels: ChannelMap | None, kept: Mapping[str, int]) -> dict[str, Any]:
    """What a plan would say of its costs; a branch is dropped where nothing of its groups is kept."""
    if channels is None:
        return {}
    cost = channels.cost
    dropped = [b.id for b in channels.branches if b.groups and not any(kept[group] for group in b.groups)]
    return {
        "macs_before": cost.macs(), "macs_after": cost.macs(kept, dropped), "dropped": dropped,
        "params_before": cost.params(), "params_after": cost.params(kept, dropped),
    }  # fmt: skip


def _note(known: Mapping[str, Any], sizes: Mapping[str, int], kept: Mapping[str, int]) -> str:
    words = []
    for what, text in (("macs", "MACs"), ("params", "parameters")):
        before, after = known.get(f"{what}_before"), known.get(f"{what}_after")
        if before and after is not None:
            words.append(f"{after / before:.1%} of the {text}")
    words.append(f"{sum(kept.values()):,} of {sum(sizes.values()):,} channels")
    dropped = len(known.get("dropped", ()))
    if dropped:
        words.append(f"{dropped} branch{'es' if dropped > 1 else ''} dropped")
    return ", ".join(words)


def _positions(stages: list[str]) -> list[float]:
    """Where the bars stand: one apart, and more between stages."""
    at, x = [], 0.0
    for i, stage in enumerate(stages):
        x += 0.0 if not i else 1.0 if stage == stages[i - 1] else 1.9
        at.append(x)
    return at


def _draw(axes: Axes, row: _Row, sizes: Mapping[str, int], at: list[float], stages: list[str], share: bool) -> None:
    full = np.array(list(sizes.values()), float)
    kept = np.array([row.kept[group] for group in sizes], float)
    gone = kept == 0
    unit = full if share else np.ones_like(full)
    x = np.array(at)
    axes.bar(x, full / unit, 0.82, color=LOST, label="full", clip_on=False)
    axes.bar(x, kept / unit, 0.82, color=KEPT, label="kept", clip_on=False)
    axes.bar(x[gone], (full / unit)[gone], 0.82, facecolor="white", edgecolor=CUT, hatch="////", label="dropped")
    top = float((full / unit).max())
    if len(at) <= _MOST_NUMBERS:
        for place, k, f in zip(at, kept, full, strict=True):
            text = f"{k:.0f}/{f:.0f}" if share else f"{k:.0f}"
            foot = (1.0 if share else f) + 0.03 * top
            if k:
                axes.text(place, foot, text, fontsize=SMALL, ha="center", va="bottom", rotation=90 if share else 0)
    room = (1.65 if share else 1.16) if len(at) <= _MOST_NUMBERS else 1.05
    axes.set_ylim(0, top * room)
    axes.set_xlim(at[0] - 0.9, at[-1] + 0.9)
    if share:
        axes.set_yticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    axes.set_ylabel("width kept" if share else "channels")
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"{row.name}: {row.note}" if row.name else row.note)
    for before, after, a, b in zip(at, at[1:], stages, stages[1:], strict=False):
        if a != b:
            axes.axvline((before + after) / 2, color="#999999", linewidth=0.7, linestyle=(0, (3, 3)))


def _name_stages(axes: Axes, stages: list[str], at: list[float]) -> None:
    """Above the bars, where there is room; shortened to the last part of the path where that gives room."""
    from matplotlib.transforms import blended_transform_factory

    if not any(stages):
        return
    axes.set_title(axes.get_title(loc="left"), pad=18)
    place = blended_transform_factory(axes.transData, axes.transAxes)
    letters = 530 / (at[-1] - at[0] + 1.8) / 5.2
    runs = [(stage, list(run)) for stage, run in groupby(range(len(at)), key=lambda i: stages[i])]
    spans = [(stage, at[run[0]], at[run[-1]], len(run)) for stage, run in runs]
    short = any(n > 2 and len(stage) > (last - first + 1.7) * letters for stage, first, last, n in spans)
    for stage, first, last, _ in spans:
        text = stage.rpartition(".")[2] if short else stage
        if text and len(text) <= (last - first + 1.7) * letters:
            middle = (first + last) / 2
            axes.text(middle, 1.03, text, transform=place, fontsize=SMALL, ha="center", color="#555555", style="italic")


def _legend(figure: Any, dropped: bool) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=KEPT, label="kept"), Patch(facecolor=LOST, label="removed")]
    if dropped:
        patches.append(Patch(facecolor="white", edgecolor=CUT, hatch="////", label="dropped whole"))
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches))


def _words(sizes: Mapping[str, int], rows: list[_Row]) -> str:
    texts = []
    for row in rows:
        gone = [group for group in sizes if not row.kept[group]]
        lost = f"; dropped: {', '.join(gone)}" if gone else ""
        texts.append(f"{row.name or 'The network'}: {row.note}{lost}.")
    return f"Bars of full and kept width for {len(sizes)} groups of channels. {' '.join(texts)}"
