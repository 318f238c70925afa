"""From kept channels to a plan: the positions of every tensor that stay, attributes that follow, costs before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attrim.core.axes import Axis
from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.core.plan import AttributeCut, Cut, PruningPlan
from attrim.errors import InputError
from attrim.modules.names import fingerprint

__all__ = ["plan_from_kept"]


def plan_from_kept(
    channels: ChannelMap, kept: Mapping[str, Any], provenance: Mapping[str, Any] | None = None
) -> PruningPlan:
    """A plan that keeps exactly the channels ``kept[group]`` (indices) of each named group and everything else.

    Raises:
        InputError: an unknown group, an empty selection, or indices outside the group.

    Example:
        >>> plan = attrim.plan_from_kept(channels, {"layer1.0.conv1": [0, 2, 5, 7]})
    """
    chosen = {name: _indices(channels, name, indices) for name, indices in kept.items()}
    removed: dict[Axis, list[IntArray]] = {}
    for name, indices in chosen.items():
        group = channels[name]
        gone = np.setdiff1d(np.arange(group.size), indices, assume_unique=True)
        if gone.size:
            for member in group.members:
                removed.setdefault(member.axis, []).append(member.index[gone].ravel())
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for axis, positions in removed.items():
        stays = np.ones(channels.shapes[axis.tensor][axis.dim], bool)
        stays[np.concatenate(positions)] = False
        cuts.setdefault(axis.tensor, {})[axis.dim] = tuple(np.flatnonzero(stays).tolist())
    ordered = {name: Cut(channels.shapes[name], cuts[name]) for name in channels.shapes if name in cuts}
    counts = {name: len(indices) for name, indices in chosen.items()}
    return PruningPlan(
        fingerprint=channels.fingerprint,
        cuts=ordered,
        attributes=_attributes(channels, counts),
        groups={
            g.id: {
                "size": g.size,
                "kept": counts.get(g.id, g.size),
                "exact": g.exact,
                "axes": [str(m.axis) for m in g.members],
            }
            for g in channels
        },
        provenance={**_costs(channels, counts), "fingerprint_after": _after(channels, ordered), **(provenance or {})},
    )


def _indices(channels: ChannelMap, name: str, indices: Any) -> IntArray:
    group = channels[name]
    try:
        given = np.asarray(sorted(indices) if isinstance(indices, (set, frozenset)) else indices)
    except (TypeError, ValueError):
        given = np.asarray(None)
    if given.dtype == bool:
        raise InputError(
            f"group '{name}': expected the indices of the channels that stay, found a boolean mask. "
            "Pass its indices: numpy.flatnonzero(mask), or mask.nonzero().flatten()."
        )
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise InputError(f"group '{name}': expected a flat list of channel indices (ints), found {str(indices)[:60]}.")
    kept = np.unique(given)
    if not kept.size or kept[0] < 0 or kept[-1] >= group.size:
        raise InputError(
            f"group '{name}' has channels 0 … {group.size - 1} and keeps at least one; found {given.tolist()}."
        )
    return kept.astype(np.int64)


def _attributes(channels: ChannelMap, counts: Mapping[str, int]) -> dict[str, dict[str, AttributeCut]]:
    cuts: dict[str, dict[str, AttributeCut]] = {}
    for rule in channels.attributes:
        after = rule.fixed + sum(per * counts.get(name, channels[name].size) for name, per in rule.per_channel)
        if after != rule.before:
            cuts.setdefault(rule.module, {})[rule.attribute] = AttributeCut(rule.before, after)
    return cuts


def _costs(channels: ChannelMap, counts: Mapping[str, int]) -> dict[str, int]:
    cost = channels.cost
    return {
        "macs_before": cost.macs(), "macs_after": cost.macs(counts),
        "params_before": cost.params(), "params_after": cost.params(counts),
        "channels_before": cost.channels(), "channels_after": cost.channels(counts),
    }  # fmt: skip


def _after(channels: ChannelMap, cuts: Mapping[str, Cut]) -> str:
    return fingerprint({n: cuts[n].shape_after if n in cuts else shape for n, shape in channels.shapes.items()})
