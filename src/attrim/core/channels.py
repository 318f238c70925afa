"""The channel map: which channels of a network can go, what goes with them, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from attrim.core.axes import Axis
from attrim.core.branches import Branch
from attrim.core.cost import CostModel, IntArray
from attrim.errors import InputError

__all__ = ["AttributeRule", "ChannelGroup", "ChannelMap", "Member", "PinnedAxis", "Reason", "Tap"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why channels are pinned, or where something happened.

    Attributes:
        text: what happened, for people.
        operator: the ATen operator, or "".
        module: path of the module that ran it, "" for the model itself.
        source: ``file.py:line`` of the user's code, or "".
    """

    text: str
    operator: str = ""
    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = ", ".join(
            part
            for part in (
                self.operator,
                f"in module '{self.module}'" if self.module else "",
                f"at {self.source}" if self.source else "",
            )
            if part
        )
        return f"{self.text} ({where})" if where else self.text


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One tensor axis that loses positions when a channel of the group goes.

    Attributes:
        axis: the tensor and dimension.
        index: shape ``(size, k)``; channel ``c`` owns the positions ``index[c]`` of the axis.
        role: ``out`` (rows of a weight that produce the channel), ``in`` (columns of a weight that consume it),
            ``scale`` and ``shift`` (affine parameters of a norm, biases), ``state`` (buffers), ``param`` (used directly).
    """

    axis: Axis
    index: IntArray
    role: str


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """A module whose output shows the group's channels: where activations are watched or gated.

    Attributes:
        module: path of the module.
        dim: dimension of its output tensor that holds the channels.
        index: shape ``(size, k)``; channel ``c`` is found at positions ``index[c]`` of that dimension.
        kind: ``conv``, ``linear``, ``norm``, ``act`` or ``other``.
    """

    module: str
    dim: int
    index: IntArray
    kind: str


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Channels that can be removed one by one; each removal takes all its positions on every member axis at once.

    Attributes:
        id: stable name, the path of the first producing module.
        size: number of channels.
        members: the axes that shrink.
        taps: where the channels can be seen.
        effects: why removing is not exactly "zero at every consumer" (for example ``layer norm statistics``); empty
            means exact.
        kind: structure of the group, equal for groups that look alike (the isomorphic scope).
    """

    id: str
    size: int
    members: tuple[Member, ...]
    taps: tuple[Tap, ...] = ()
    effects: tuple[str, ...] = ()
    kind: str = ""

    @property
    def exact(self) -> bool:
        """Whether removing a channel equals zeroing it at every consumer."""
        return not self.effects

    def with_role(self, *roles: str) -> tuple[Member, ...]:
        """The members that play one of ``roles``."""
        return tuple(m for m in self.members if m.role in roles)

    def __repr__(self) -> str:
        axes = ", ".join(f"{m.axis}[{m.role}]" for m in self.members[:4])
        more = f", … {len(self.members) - 4} more" if len(self.members) > 4 else ""
        note = "" if self.exact else f", inexact: {'; '.join(self.effects)}"
        return f"ChannelGroup({self.id!r}, size={self.size}, {axes}{more}{note})"


@dataclass(frozen=True, slots=True, eq=False)
class PinnedAxis:
    """Positions of an axis that must stay, with the reason.

    Attributes:
        axis: the tensor and dimension.
        positions: shape ``(n,)``; the pinned positions.
        size: length of the axis; ``n == size`` when all of it is pinned.
        reason: why.
    """

    axis: Axis
    positions: IntArray
    size: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class AttributeRule:
    """A number in a module that must follow the cut (``num_heads``, ``num_groups``, a width read from an attribute).

    Its new value is ``fixed + Σ_g per_channel[g] · kept(g)``.
    """

    module: str
    attribute: str
    before: int
    fixed: int
    per_channel: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelMap:
    """What :func:`attrim.trace` finds: channel groups, pinned axes with reasons, and a compiled cost.

    Attributes:
        groups: group id -> group, in network order.
        pinned: axes (or parts of axes) that must stay.
        cost: MACs and parameters as a function of the kept channels.
        fingerprint: digest of all tensor names and shapes; a plan made for another model is refused by it.
        shapes: tensor name -> shape, parameters and buffers (a tied tensor under its first name).
        attributes: numbers in modules that follow a cut.
        aliases: other name of a tied tensor -> its first name.
        branches: residual branches that can be removed whole, in network order (see :class:`Branch`).
        passes: block -> branches: the block becomes an identity once all of these are removed.
        sums: sums of two activations that hold no branch that could be removed, with the reasons.
        inputs: group -> the layer that reads its channels from an input that stays whole, for groups of channels that are
            only not read any more (:func:`attrim.modules.input_groups.input_groups`); empty as traced.
    """

    groups: Mapping[str, ChannelGroup]
    pinned: tuple[PinnedAxis, ...]
    cost: CostModel
    fingerprint: str
    shapes: Mapping[str, tuple[int, ...]]
    attributes: tuple[AttributeRule, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    passes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sums: tuple[Reason, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, group: str) -> ChannelGroup:
        if group not in self.groups:
            raise InputError(f"unknown group '{group}'. The groups are: {', '.join(list(self.groups)[:8])}, …")
        return self.groups[group]

    def explain(self, name: str) -> str:
        """What happens to a tensor: the branch it goes with, the groups it belongs to, and why the rest is pinned.

        Args:
            name: a tensor (``layer1.0.conv1.weight``) or one axis of it (``layer1.0.conv1.weight:0``).

        Raises:
            InputError: no such tensor; close names are listed.
        """
        tensor, colon, dim = name.partition(":")
        tensor = self.aliases.get(tensor, tensor)
        if tensor not in self.shapes:
            from difflib import get_close_matches

            close = get_close_matches(tensor, list(self.shapes), n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise InputError(f"no parameter or buffer is named '{tensor}'.{hint}")
        if colon and (not dim.isdigit() or int(dim) >= len(self.shapes[tensor])):
            raise InputError(
                f"'{tensor}' has the dimensions 0 … {len(self.shapes[tensor]) - 1}; found ':{dim}'. "
                f"Ask for explain('{tensor}:0'), or for explain('{tensor}') to see all."
            )
        lines = [f"{tensor} {tuple(self.shapes[tensor])}"]
        lines += [f"  goes with the branch '{b.id}' ({b.note})" for b in self.branches if tensor in b.tensors]
        for d, size in enumerate(self.shapes[tensor]):
            if not dim or int(dim) == d:
                lines += self._explain_axis(Axis(tensor, d), size)
        return "\n".join(lines)

    def _explain_axis(self, axis: Axis, size: int) -> list[str]:
        lines = []
        for group in self:
            for member in group.members:
                if member.axis == axis:
                    per = f", {member.index.shape[1]} positions a channel" if member.index.shape[1] > 1 else ""
                    note = "exact" if group.exact else "inexact: " + "; ".join(group.effects)
                    lines.append(
                        f"  dim {axis.dim} ({size}): group '{group.id}', {group.size} channels as {member.role}{per}, {note}"
                    )
        for pin in self.pinned:
            if pin.axis == axis:
                part = "all" if len(pin.positions) == size else f"{len(pin.positions)} positions"
                lines.append(f"  dim {axis.dim} ({size}): {part} pinned: {pin.reason}")
        return lines or [f"  dim {axis.dim} ({size}): not a channel axis"]

    def table(self) -> str:
        """The groups, the pinned parts and the residual branches as plain text, one line each."""
        rows = [("group", "channels", "axes", "exact")]
        rows += [
            (g.id, str(g.size), str(len(g.members)), "yes" if g.exact else "no: " + "; ".join(g.effects)) for g in self
        ]
        width = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{width[0]}}  {b:>{width[1]}}  {c:>{width[2]}}  {d}" for a, b, c, d in rows]
        lines += ["", "pinned:"] if self.pinned else []
        lines += [f"  {pin.axis} ({len(pin.positions)} of {pin.size}): {pin.reason}" for pin in self.pinned]
        lines += ["", "branches that can be removed whole:"] if self.branches else []
        lines += [
            f"  {b.id}: {len(b.tensors)} tensors, {self.cost.macs() - self.cost.macs(drops=[b.id]):,} MACs; "
            f"{'the input' if b.shortcut == 'identity' else 'a computed shortcut'} stays"
            + (f"; inside {b.inside}" if b.inside else "")
            for b in self.branches
        ]
        lines += ["", "sums without such a branch:", *(f"  {reason}" for reason in self.sums)] if self.sums else []
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"ChannelMap({len(self.groups)} groups, {self.cost.channels()} channels, {len(self.pinned)} pinned axes, "
            + (f"{len(self.branches)} branches, " if self.branches else "")
            + f"{self.cost.macs():,} MACs, {self.cost.params():,} parameters)"
        )
