"""The pictures of what a method or a search did, drawn from the files of its run, so that they can be drawn again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from attrim.cli.runs import CONFIG_FILE, Run
from attrim.core.plan import PruningPlan
from attrim.methods.attention import AttentionStatistics
from attrim.methods.globalpru.history import history
from attrim.report import Picture
from attrim.report.figures import (
    agreement_by_epoch,
    attention_between_layers,
    attention_histograms,
    kept_by_layer,
    layer_attention,
    policy_costs,
    policy_map,
    search_curves,
)

__all__ = ["PICTURES", "Drawn", "method_pictures"]

PICTURES = (
    "policy.svg",
    "costs-macs.svg",
    "costs-params.svg",
    "costs-channels.svg",
    "attention.svg",
    "agreement.svg",
    "search.svg",
    "ratios.svg",
)
"""Every file name that :func:`method_pictures` may give."""

_MOMENTS = 4
_PANELS = 48
_RESOURCES = {"macs": "MACs", "params": "parameters", "channels": "channels"}

Drawn = dict[str, Callable[[], Picture]]
"""File name -> what draws it."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What a run has left in its folder."""

    config: Mapping[str, Any]
    lines: list[dict[str, Any]]
    plan: PruningPlan
    method: Path

    def steps(self, step: str) -> list[dict[str, Any]]:
        """Lines of the metrics of one step."""
        return [line for line in self.lines if line["step"] == step]


def method_pictures(folder: Path, plan: PruningPlan) -> Drawn:
    """What can be drawn of a run besides its architecture; what it has no figures for is left out.

    Args:
        folder: of the run.
        plan: its plan.

    Returns:
        File name -> what draws it; empty for criteria, for rounds, and for a folder that is no run. ``dcpa``: the policy
        over time, its cost, attention; ``globalpru``: agreement by epoch; ``pcas``, ``cpsca``: histograms of the attention;
        a search: its curve and the keep ratios.

    Example:
        >>> for name, draw in method_pictures(folder, plan).items():
        ...     draw().save(folder / name)
    """
    file = folder / CONFIG_FILE
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(config, dict) or config.get("rounds", 1) > 1:
        return {}
    run = Run(folder, resume=True)
    draw = _search if "algorithm" in config else _METHODS.get(str(config.get("method")))
    return {} if draw is None else draw(_Files(config, run.lines(), plan, run.method))


def _dcpa(run: _Files) -> Drawn:
    found: Drawn = {}
    reports = run.steps("search")
    policy = [report for report in reports if report.get("probabilities")]
    if policy:
        at = sorted({round(i * (len(policy) - 1) / (_MOMENTS - 1)) for i in range(_MOMENTS)})
        moments = {int(policy[i]["epoch"]): policy[i]["probabilities"] for i in at}
        names = next((line["candidates"] for line in run.steps("search space") if line.get("candidates")), None)
        found["policy.svg"] = partial(policy_map, moments, names)
    for resource in reports[-1].get("target", {}) if reports else ():
        found[f"costs-{resource}.svg"] = partial(_costs, reports, resource)
    for line in run.steps("derived")[-1:]:
        if line.get("layers"):
            found["attention.svg"] = partial(attention_between_layers, line["layers"], line["names"])
        elif line.get("attention"):
            found["attention.svg"] = partial(layer_attention, line["attention"])
    return found


def _costs(reports: list[dict[str, Any]], resource: str) -> Picture:
    return policy_costs(
        [report["epoch"] for report in reports],
        [report["expected"][resource] for report in reports],
        [report["likeliest"][resource] for report in reports],
        reports[-1]["target"][resource],
        [report["tau"] for report in reports],
        resource=_RESOURCES.get(resource, resource),
    )


def _globalpru(run: _Files) -> Drawn:
    measured = [line for line in run.lines if "agreement" in line and "stage" in line]
    return {"agreement.svg": partial(_agreement, measured)} if measured else {}


def _agreement(lines: list[dict[str, Any]]) -> Picture:
    found = history(lines)
    return agreement_by_epoch(found.epochs, found.tau, found.overlap)


def _attention(run: _Files) -> Drawn:
    file = run.method / "attention.safetensors"
    return {"attention.svg": partial(_histograms, run, file)} if file.is_file() else {}


def _histograms(run: _Files, file: Path) -> Picture:
    reduction = run.config.get("option", {}).get("reduction", "mean")
    values = {group: row.numpy() for group, row in AttentionStatistics.load(file).score(reduction).items()}
    if len(values) > _PANELS:
        return layer_attention({group: row.tolist() for group, row in values.items()})
    return attention_histograms(values, threshold=_threshold(run, values))


def _threshold(run: _Files, values: Mapping[str, Any]) -> float | None:
    """The smallest attention above all that went; a floor keeps channels below it. None where no single one rules."""
    config = run.config
    ruled = config.get("scope", "global") == "global" and config.get("multiple_of", 1) == 1
    if config["method"] != "pcas" or not ruled or not set(values) <= set(run.plan.groups):
        return None
    gone = [np.sort(row)[: len(row) - int(run.plan.groups[group]["kept"])] for group, row in values.items()]
    highest = max((float(part[-1]) for part in gone if len(part)), default=None)
    if highest is None:
        return None
    above = [float(row[row > highest].min()) for row in values.values() if (row > highest).any()]
    return min(above, default=None)


def _search(run: _Files) -> Drawn:
    trials = sorted(run.steps("trial"), key=lambda line: int(line["number"]))
    curve = [float("-inf") if line["best"] is None else float(line["best"]) for line in trials]
    found: Drawn = {}
    if curve and np.isfinite(curve[-1]):
        found["search.svg"] = partial(search_curves, {str(run.config["algorithm"]): [curve]})
    sizes = {group: int(entry["size"]) for group, entry in run.plan.groups.items()}
    for line in run.steps("searched")[-1:]:
        rows = [dict(zip(line["groups"], trial["kept"], strict=True)) for trial in trials]
        inside = [g for g in line["groups"] if g in sizes and any(row[g] < sizes[g] for row in rows)]
        if inside:
            kept = {"first candidate": {g: rows[0][g] for g in inside}} if len(rows) > 1 else {}
            kept["found"] = {g: int(run.plan.groups[g]["kept"]) for g in inside}
            found["ratios.svg"] = partial(
                kept_by_layer, kept, {g: sizes[g] for g in inside}, share=True, title="Keep ratios that were found"
            )
    return found


_METHODS: Mapping[str, Callable[[_Files], Drawn]] = {
    "dcpa": _dcpa,
    "globalpru": _globalpru,
    "pcas": _attention,
    "cpsca": _attention,
}
