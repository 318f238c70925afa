"""The channel map in which streams stay whole and every layer that reads one chooses what it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from attrim.core.axes import Axis
from attrim.core.branches import Branch
from attrim.core.channels import AttributeRule, ChannelGroup, ChannelMap, Member, PinnedAxis, Reason
from attrim.core.cost import CostModel, IntArray, WidthTable
from attrim.errors import InputError
from attrim.modules.select import can_select, positions_of

__all__ = ["input_groups", "streams_of"]

_WHOLE = Reason("a residual stream that stays whole, of which every layer reads a part")


def input_groups(model: nn.Module, channels: ChannelMap, streams: Collection[str] | None = None) -> ChannelMap:
    """A map in which ``streams`` are no groups any more; each layer that reads one has a group of its inputs instead.

    The group of a layer ``layer2.1.conv1`` is ``layer2.1.conv1.in``: its channels are those of the stream, and removing one
    takes it away from this layer alone, which from then on reads its input through a selection. That is exact, and the cost
    model prices it. Layers that cannot select (grouped or transposed convolutions, layers of other types, tied weights,
    inputs that are not the stream alone) go on reading the whole stream. In a network that selects already, the streams
    are pinned; layers that select, and others that read these streams, have groups of what they read now.

    Args:
        model: the traced network.
        channels: its map; not changed.
        streams: ids of groups that stay whole; None for :func:`streams_of`.

    Raises:
        InputError: not the id of a group.

    Source:
        The channel selection of Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV
        2017, section 4.

    Example:
        >>> free = input_groups(model, channels)
        >>> plan = attrim.plan_from_kept(free, {"layer2.1.conv1.in": range(64)})
        >>> small = attrim.apply(model, plan)
    """
    whole = streams_of(model, channels) if streams is None else tuple(dict.fromkeys(streams))
    unknown = [id for id in whole if id not in channels.groups]
    if unknown:
        raise InputError(f"streams: '{unknown[0]}' is no group of this map; see list(channels.groups).")
    readers = {path: member for group in whole for path, member in _readers(model, channels, group)}
    readers |= _earlier(model, channels)
    if not whole and not readers:
        return channels
    added = {f"{path}.in": _group(model, channels, path, member) for path, member in readers.items()}
    order = {name: i for i, name in enumerate(channels.shapes)}
    groups = [g for g in channels if g.id not in whole] + list(added.values())
    groups.sort(key=lambda g: (order[g.members[0].axis.tensor], g.id not in added))
    sizes = {id: channels[id].size for id in whole}
    branches = tuple(_branch(b, added, sizes) for b in channels.branches)
    return replace(
        channels,
        groups={g.id: g for g in groups},
        pinned=_pinned(channels, whole, {m.axis for m in readers.values()}),
        cost=_cost(channels, groups, added, branches),
        attributes=tuple(_attribute(rule, sizes) for rule in channels.attributes),
        branches=branches,
        inputs={**channels.inputs, **{f"{path}.in": path for path in readers}},
    )


def streams_of(model: nn.Module, channels: ChannelMap) -> tuple[str, ...]:
    """Groups that several layers produce, grouped convolutions not counted: what residual blocks add up to.

    Products of two layers' outputs look alike; ask :class:`attrim.modules.gates.Gates` with an example to tell them apart.
    """
    modules = dict(model.named_modules())
    found = []
    for group in channels:
        owners = {m.axis.tensor.rpartition(".")[0] for m in group.with_role("out") if m.axis.tensor.endswith(".weight")}
        if len([o for o in owners if getattr(modules.get(o), "groups", 1) == 1]) > 1:
            found.append(group.id)
    return tuple(found)


def _readers(model: nn.Module, channels: ChannelMap, group: str) -> list[tuple[str, Member]]:
    """Layers that read nothing but the stream and can read less of it."""
    modules = dict(model.named_modules())
    tied = set(channels.aliases.values())
    found = []
    for member in channels[group].with_role("in"):
        tensor, dim = member.axis.tensor, member.axis.dim
        path = tensor.removesuffix(".weight")
        whole = member.index.size == channels.shapes[tensor][dim]
        plain = path != tensor and tensor not in tied and str(member.axis) in channels.cost.rows
        if whole and plain and dim == 1 and can_select(modules, path):
            found.append((path, member))
    return found


def _earlier(model: nn.Module, channels: ChannelMap) -> dict[str, Member]:
    """Layers that select already, and those that read the streams that these select from."""
    modules = dict(model.named_modules())
    selecting = {path for path, module in modules.items() if positions_of(module) is not None}
    tied = set(channels.aliases.values())
    found = {}
    for pin in channels.pinned if selecting else ():
        path, dim = pin.axis.tensor.removesuffix(".weight"), pin.axis.dim
        reads = path in selecting or (pin.reason.module in selecting and "index_select" in pin.reason.operator)
        plain = path != pin.axis.tensor and pin.axis.tensor not in tied and len(pin.positions) == pin.size
        if reads and plain and dim == 1 and f"{path}.in" not in channels.groups and can_select(modules, path):
            found[path] = Member(pin.axis, np.arange(pin.size)[:, None], "in")
    return found


def _group(model: nn.Module, channels: ChannelMap, path: str, member: Member) -> ChannelGroup:
    kernel = list(channels.shapes[member.axis.tensor][2:])
    kind = f"in:{type(model.get_submodule(path)).__name__}.weight:{member.axis.dim}{kernel or ''}"
    return ChannelGroup(f"{path}.in", len(member.index), (member,), kind=f"reads {kind}")


def _pinned(channels: ChannelMap, streams: Collection[str], free: Collection[Axis]) -> tuple[PinnedAxis, ...]:
    held = [
        PinnedAxis(m.axis, np.sort(m.index.ravel()), channels.shapes[m.axis.tensor][m.axis.dim], _WHOLE)
        for id in streams
        for m in channels[id].members
        if m.axis not in free
    ]
    return (*(pin for pin in channels.pinned if pin.axis not in free), *held)


def _attribute(rule: AttributeRule, streams: Mapping[str, int]) -> AttributeRule:
    fixed = rule.fixed + sum(per * streams.get(id, 0) for id, per in rule.per_channel)
    return replace(rule, fixed=fixed, per_channel=tuple((id, per) for id, per in rule.per_channel if id not in streams))


def _branch(branch: Branch, added: Mapping[str, ChannelGroup], streams: Collection[str]) -> Branch:
    inner = [id for id, group in added.items() if group.members[0].axis.tensor in branch.tensors]
    return replace(
        branch,
        groups=(*(id for id in branch.groups if id not in streams), *inner),
        widths=tuple((id, member) for id, member in branch.widths if id not in streams),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """Part of a width: so many positions for each channel of a group."""

    row: int
    group: str
    multiplicity: int


def _cost(
    channels: ChannelMap,
    groups: Collection[ChannelGroup],
    added: Mapping[str, ChannelGroup],
    branches: Collection[Branch],
) -> CostModel:
    """The cost with streams as constants and the inputs of their readers as widths of their own."""
    cost, ids = channels.cost, [g.id for g in groups]
    table = cost.widths
    columns = zip(table.row.tolist(), table.group.tolist(), table.multiplicity.tolist(), strict=True)
    own = {cost.rows[str(g.members[0].axis)]: g for g in added.values()}
    fixed, entries = table.fixed.copy(), []
    for row, number, count in columns:
        group = cost.groups[number]
        if row in own:
            entries.append(_Entry(row, own[row].id, own[row].members[0].index.shape[1]))
        elif group in ids:
            entries.append(_Entry(row, group, count))
        else:
            fixed[row] += count * channels[group].size
    priced = {e.row for e in entries}
    for row, g in own.items():
        if row not in priced:  # pinned so far
            fixed[row] = 0
            entries.append(_Entry(row, g.id, 1))
    widths = WidthTable(
        fixed, _ints(e.row for e in entries), _ints(ids.index(e.group) for e in entries),
        _ints(e.multiplicity for e in entries),
    )  # fmt: skip
    return replace(
        cost,
        groups=tuple(ids),
        sizes=_ints(g.size for g in groups),
        widths=widths,
        group_branch=_ints(_owner(g, added, channels, branches) for g in groups),
    )


def _owner(
    group: ChannelGroup, added: Mapping[str, ChannelGroup], channels: ChannelMap, branches: Collection[Branch]
) -> int:
    """The smallest branch with which a group vanishes, by position in the cost model, or -1."""
    cost = channels.cost
    if group.id not in added:
        return -1 if cost.group_branch is None else int(cost.group_branch[cost.groups.index(group.id)])
    holding = [b for b in branches if group.id in b.groups]
    return cost.branches.index(min(holding, key=lambda b: len(b.tensors)).id) if holding else -1


def _ints(values: Iterable[int]) -> IntArray:
    return np.fromiter(values, np.int64)
