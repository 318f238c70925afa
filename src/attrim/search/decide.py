"""From kept channels to a plan: the positions of every tensor that stay, attributes that follow, costs before and after."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attrim.core.axes import Axis
from attrim.core.branches import Replacement
from attrim.core.channels import ChannelMap, Member
from attrim.core.cost import IntArray
from attrim.core.plan import AttributeCut, Cut, PruningPlan, within
from attrim.core.selection import Selection
from attrim.errors import InputError
from attrim.modules.names import fingerprint

__all__ = ["Removal", "plan_from_kept"]


def plan_from_kept(
    channels: ChannelMap,
    kept: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    *,
    drops: Iterable[str] = (),
) -> PruningPlan:
    """A plan that keeps exactly the channels ``kept[group]`` (indices) of each named group and everything else.

    Args:
        channels: the traced network.
        kept: group id -> indices of the channels that stay. What it says of a group that vanishes with a dropped branch is
            checked and then ignored.
        provenance: notes to keep in the plan.
        drops: ids of residual branches (:attr:`ChannelMap.branches`) that are removed whole, and with them the branches
            inside.

    Raises:
        InputError: an unknown group, an empty selection, indices outside the group, or an unknown branch.

    Example:
        >>> plan = attrim.plan_from_kept(channels, {"layer1.0.conv1": [0, 2, 5, 7]}, drops=["layer3.1"])
    """
    out = Removal.of(channels, drops)
    chosen = {name: _indices(channels, name, indices) for name, indices in kept.items()}
    chosen = {name: indices for name, indices in chosen.items() if name not in out.groups}
    removed: dict[Axis, list[IntArray]] = {}
    for name, indices in chosen.items():
        group = channels[name]
        gone = np.setdiff1d(np.arange(group.size), indices, assume_unique=True)
        if gone.size:
            for member in (*group.members, *out.widths.get(name, ())):
                if member.axis.tensor not in out.tensors:
                    removed.setdefault(member.axis, []).append(member.index[gone].ravel())
    shapes = out.shapes(channels)
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for axis, positions in removed.items():
        stays = np.ones(shapes[axis.tensor][axis.dim], bool)
        stays[np.concatenate(positions)] = False
        cuts.setdefault(axis.tensor, {})[axis.dim] = tuple(np.flatnonzero(stays).tolist())
    ordered = {name: Cut(shapes[name], cuts[name]) for name in shapes if name in cuts}
    counts = {name: len(indices) for name, indices in chosen.items()}
    selects = _selects(channels, ordered)
    left = {n: ordered[n].shape_after if n in ordered else shape for n, shape in shapes.items()}
    after = fingerprint(left | {f"{path}.positions": (len(s.keep),) for path, s in selects.items()})
    dropped = {"dropped": list(out.branches)} if out.branches else {}
    return PruningPlan(
        fingerprint=channels.fingerprint,
        cuts=ordered,
        drops=tuple(out.replacements),
        attributes=_attributes(channels, counts, out.replacements),
        groups={
            g.id: {
                "size": g.size,
                "kept": 0 if g.id in out.groups else counts.get(g.id, g.size),
                "exact": g.exact,
                "axes": [str(m.axis) for m in g.members],
            }
            for g in channels
        },
        provenance={
            **_costs(channels, counts, out.branches),
            "fingerprint_after": after,
            **dropped,
            **(provenance or {}),
        },
        replacements={path: r for path, r in out.replacements.items() if r != Replacement()},
        selects=selects,
    )


def _selects(channels: ChannelMap, cuts: Mapping[str, Cut]) -> dict[str, Selection]:
    """What is left for each layer to read of an input that stays whole."""
    selects = {}
    for group, path in channels.inputs.items():
        axis = channels[group].members[0].axis
        cut = cuts.get(axis.tensor)
        if cut is not None and axis.dim in cut.keep:
            selects[path] = Selection(1 - len(cut.shape_before), cut.keep[axis.dim])
    return selects


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes with a choice of branches.

    Attributes:
        branches: ids of all branches that go, those inside others included.
        replacements: module path -> what stands in its place.
        tensors: tensors that go.
        groups: groups that vanish.
        widths: group -> axes of buffers of the stand-ins that its channels lie on.
    """

    branches: tuple[str, ...]
    replacements: Mapping[str, Replacement]
    tensors: frozenset[str]
    groups: frozenset[str]
    widths: Mapping[str, tuple[Member, ...]]

    @classmethod
    def of(cls, channels: ChannelMap, drops: Iterable[str]) -> Removal:
        """Resolve branch ids.

        Raises:
            InputError: not the id of a branch.
        """
        gone = channels.cost.gone(drops)
        ids = tuple(name for name, out in zip(channels.cost.branches, gone, strict=True) if out)
        outermost = [b for b in channels.branches if b.id in ids and b.inside not in ids]
        new = {path: r for b in outermost for path, r in b.replacements.items()}
        whole = [block for block, needed in channels.passes.items() if all(name in ids for name in needed)]
        new = {path: r for path, r in new.items() if not within(path, whole)}
        new.update(dict.fromkeys((b for b in whole if not within(b, new)), Replacement()))
        widths: dict[str, tuple[Member, ...]] = {}
        for group, member in (pair for b in outermost for pair in b.widths):
            if member.axis.tensor.removesuffix(".zeros") in new:
                widths[group] = (*widths.get(group, ()), member)
        return cls(
            ids,
            new,
            frozenset(name for b in outermost for name in b.tensors),
            frozenset(name for b in channels.branches if b.id in ids for name in b.groups),
            widths,
        )

    def shapes(self, channels: ChannelMap) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape once the branches are gone and before any cut, buffers of the stand-ins included."""
        left = {name: shape for name, shape in channels.shapes.items() if name not in self.tensors}
        return left | {f"{path}.zeros": (r.width,) for path, r in self.replacements.items() if r.width is not None}


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


def _attributes(
    channels: ChannelMap, counts: Mapping[str, int], drops: Collection[str]
) -> dict[str, dict[str, AttributeCut]]:
    cuts: dict[str, dict[str, AttributeCut]] = {}
    for rule in channels.attributes:
        if within(rule.module, drops):
            continue
        after = rule.fixed + sum(per * counts.get(name, channels[name].size) for name, per in rule.per_channel)
        if after != rule.before:
            cuts.setdefault(rule.module, {})[rule.attribute] = AttributeCut(rule.before, after)
    return cuts


def _costs(channels: ChannelMap, counts: Mapping[str, int], drops: Collection[str]) -> dict[str, int]:
    cost = channels.cost
    return {
        "macs_before": cost.macs(), "macs_after": cost.macs(counts, drops),
        "params_before": cost.params(), "params_after": cost.params(counts, drops),
        "channels_before": cost.channels(), "channels_after": cost.channels(counts, drops),
    }  # fmt: skip
