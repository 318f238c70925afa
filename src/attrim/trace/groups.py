"""The channel map of a solved run: groups with members and taps, pinned axes with reasons, attributes that follow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from attrim.core.axes import Axis
from attrim.core.branches import Branch
from attrim.core.channels import AttributeRule, ChannelGroup, ChannelMap, Member, PinnedAxis, Reason, Tap
from attrim.core.cost import IntArray
from attrim.modules.names import NamedTensors, fingerprint
from attrim.trace.branches import Found, find_branches
from attrim.trace.cost import compile_cost, linear_form
from attrim.trace.labels import LabelSpace, Recorder
from attrim.trace.owners import group_owner, owners
from attrim.trace.partition import Partition
from attrim.trace.solve import Solution
from attrim.trace.tracer import Tracer

if TYPE_CHECKING:
    from attrim.trace.capture import Analysis

__all__ = ["build_map"]

QUIET = ("kernel size",)
"""Reasons that are true of every convolution and would only fill the list."""


def build_map(analysis: Analysis) -> ChannelMap:
    """Assemble the public channel map."""
    named, space, tracer, book = analysis.engine.named, analysis.space, analysis.tracer, analysis.book
    solution, parts = analysis.solution, analysis.parts
    members = _members(named, space, book, parts)
    ids = _names(members)
    taps = _taps(tracer, parts)
    modules = dict(analysis.engine.model.named_modules())
    found, passes, sums = find_branches(analysis)
    known = owners(tracer.graph, found)
    groups = {
        ids[g]: ChannelGroup(
            ids[g], int(parts.sizes[g]), tuple(members[g]), tuple(taps[g]), parts.effects[g],
            _kind(members[g], modules, named),
        )
        for g in range(len(parts.sizes))
    }  # fmt: skip
    return ChannelMap(
        groups=groups,
        pinned=tuple(_pinned(space, solution, parts)),
        cost=compile_cost(
            named, space, book, parts, tuple(ids), known, [group_owner(g, known) for g in groups.values()]
        ),
        fingerprint=fingerprint(named.shapes),
        shapes=named.shapes,
        attributes=tuple(_attributes(book, parts, ids)),
        aliases=named.aliases,
        branches=tuple(_finished(f, groups, ids, parts) for f in found),
        passes=passes,
        sums=tuple(sums),
    )


def _finished(found: Found, groups: Mapping[str, ChannelGroup], ids: Sequence[str], parts: Partition) -> Branch:
    """A branch with the groups that vanish with it, and the channels that the zeros in its place must follow."""
    gone = set(found.branch.tensors)
    inner = tuple(g.id for g in groups.values() if all(m.axis.tensor in gone for m in g.members))
    widths = tuple(
        (ids[g], Member(Axis(f"{path}.zeros", 0), table, "state"))
        for path, vector in found.widths.items()
        for g, table in _by_group(vector, parts)
        if ids[g] not in inner
    )
    return replace(found.branch, groups=inner, widths=widths)


def _by_group(vector: IntArray, parts: Partition) -> list[tuple[int, IntArray]]:
    """Positions of a label vector per group, as index tables ``(size, k)``."""
    group = parts.group_of[vector]
    held = np.flatnonzero(group >= 0)
    if not held.size:
        return []
    order = held[np.lexsort((parts.channel_of[vector[held]], group[held]))]
    start = np.flatnonzero(np.diff(group[order], prepend=-1))
    numbers = group[order[start]]
    lengths = np.diff(start, append=len(order))
    per = lengths // parts.sizes[numbers]
    place = np.arange(len(order)) - np.repeat(start, lengths)
    even = place // np.repeat(np.maximum(per, 1), lengths) == parts.channel_of[vector[order]]
    whole = np.logical_and.reduceat(even, start) & (per * parts.sizes[numbers] == lengths)
    return [
        (g, order[first : first + length].reshape(-1, k))
        for g, first, length, k, ok in zip(
            numbers.tolist(), start.tolist(), lengths.tolist(), per.tolist(), whole.tolist(), strict=True
        )
        if ok
    ]


def _members(named: NamedTensors, space: LabelSpace, book: Recorder, parts: Partition) -> list[list[Member]]:
    roles = _roles(space, book)
    members: list[list[Member]] = [[] for _ in parts.sizes]
    for k, axis in enumerate(space.axes):
        labels = np.arange(space.start[k], space.start[k] + space.size[k])
        default = "param" if axis.tensor in named.parameters else "state"
        for g, table in _by_group(labels, parts):
            members[g].append(Member(axis, table, roles.get(k, default)))
    return members


def _roles(space: LabelSpace, book: Recorder) -> dict[int, str]:
    """Axis number -> the first role it was used in. Every label of a weight's vector belongs to the weight's own axis."""
    starts = np.asarray(space.start)
    roles: dict[int, str] = {}
    for labels, role in book.roles:
        mortal = labels[labels > 0]
        if mortal.size:
            roles.setdefault(int(np.searchsorted(starts, mortal[0], side="right")) - 1, role)
    return roles


def _names(members: Sequence[Sequence[Member]]) -> list[str]:
    """A stable, readable id per group: the path of its first producer."""
    ids: list[str] = []
    seen: dict[str, int] = defaultdict(int)
    for group in members:
        first = next((m for m in group if m.role == "out"), group[0])
        tensor = first.axis.tensor
        name = tensor.removesuffix(".weight")
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def _taps(tracer: Tracer, parts: Partition) -> list[list[Tap]]:
    taps: list[list[Tap]] = [[] for _ in parts.sizes]
    seen: set[tuple[str, int, int]] = set()
    tables: dict[int, list[tuple[int, IntArray]]] = {}  # a norm and its activation show the same labels
    for path, module, value in tracer.taps:
        if not value.live:
            continue  # the zeros in the place of a removed branch show its channels, but nothing of them
        for dim, vector in enumerate(value.axes):
            if vector is None:
                continue
            if id(vector) not in tables:
                tables[id(vector)] = _by_group(vector, parts)
            for g, table in tables[id(vector)]:
                if (path, dim, g) not in seen:
                    seen.add((path, dim, g))
                    taps[g].append(Tap(path, dim, table, _tap_kind(module)))
    return taps


def _tap_kind(module: nn.Module) -> str:
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return "norm"
    return "act" if type(module).__module__ == "torch.nn.modules.activation" else "other"


def _kind(members: Sequence[Member], modules: Mapping[str, nn.Module], named: NamedTensors) -> str:
    """A word that is equal for groups of the same structure."""
    parts = []
    for m in members:
        path, _, leaf = m.axis.tensor.rpartition(".")
        module = modules.get(path)
        kernel = tuple(named.tensors[m.axis.tensor].shape[2:])
        parts.append(f"{m.role}:{type(module).__name__}.{leaf}:{m.axis.dim}{list(kernel) if kernel else ''}")
    return " + ".join(sorted(parts))


def _pinned(space: LabelSpace, solution: Solution, parts: Partition) -> list[PinnedAxis]:
    lonely = np.zeros(len(parts.units), bool)
    lonely[parts.lonely] = True
    pins = []
    alone = Reason("a single channel of its kind, which an axis cannot lose")
    for k, axis in enumerate(space.axes):
        labels = np.arange(space.start[k], space.start[k] + space.size[k])
        stay = labels[parts.group_of[labels] < 0]
        if not stay.size:
            continue
        by_reason: dict[Reason, list[int]] = defaultdict(list)
        roots = solution.roots[stay]
        for root in np.unique(roots).tolist():
            reason = alone if lonely[root] else solution.reasons[root]
            by_reason[reason] += (stay[roots == root] - space.start[k]).tolist()
        pins += [
            PinnedAxis(axis, np.sort(np.asarray(positions, np.int64)), space.size[k], reason)
            for reason, positions in by_reason.items()
            if reason.text not in QUIET
        ]
    return pins


def _attributes(book: Recorder, parts: Partition, ids: Sequence[str]) -> list[AttributeRule]:
    rules: dict[tuple[str, str], AttributeRule] = {}
    for note in book.rules:
        fixed, entries = linear_form(note.vector, parts)
        if entries and (note.module, note.attribute) not in rules:
            per_channel = tuple((ids[g], count) for g, count in entries)
            rules[note.module, note.attribute] = AttributeRule(
                note.module, note.attribute, note.before, fixed, per_channel
            )
    return list(rules.values())
