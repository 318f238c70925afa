"""Tables as plain data: what attrim found and what a cut did, for a terminal, a text file or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attrim.core.channels import ChannelMap, PinnedAxis, Reason

__all__ = [
    "Figures",
    "Table",
    "branch_table",
    "channel_table",
    "comparison_table",
    "pinned_table",
    "quantity",
    "sum_table",
]


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, columns and rows of text.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: one string per column each.
        right: indices of the columns that hold numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()

    def text(self) -> str:
        """The table as aligned plain text.

        Example:
            >>> print(Table("t", ("a", "n"), (("x", "1"), ("y", "12")), frozenset({1})).text())
            t
            a   n
            x   1
            y  12
        """
        cells = (self.columns, *self.rows)
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ("  ".join(self._pad(row, i, widths[i]) for i in range(len(widths))).rstrip() for row in cells)
        return "\n".join((self.title, *lines))

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        rule = ["---:" if i in self.right else "---" for i in range(len(self.columns))]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))

    def _pad(self, row: Sequence[str], column: int, width: int) -> str:
        return row[column].rjust(width) if column in self.right else row[column].ljust(width)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is measured of one network; None where it was not.

    Attributes:
        macs: multiply-adds of the example inputs.
        params: parameters.
        accuracy: top-1, in [0, 1].
        file_bytes: size of the weights file.
        latency_ms: median time of a forward pass, in milliseconds.
    """

    macs: int
    params: int
    accuracy: float | None = None
    file_bytes: int | None = None
    latency_ms: float | None = None


def comparison_table(before: Figures, after: Figures, *, title: str = "", latency: str = "latency") -> Table:
    """Before and after, side by side, with the change in words.

    Args:
        before, after: the two networks.
        title: heading.
        latency: what the latency was measured on, such as ``latency, batch 1``.
    """
    rows: list[tuple[str, ...]] = []
    if before.accuracy is not None and after.accuracy is not None:
        points = 100 * (after.accuracy - before.accuracy)
        rows.append(("accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", f"{points:+.2f} points"))
    rows.append(("MACs", quantity(before.macs), quantity(after.macs), _kept(before.macs, after.macs)))
    rows.append(("parameters", quantity(before.params), quantity(after.params), _kept(before.params, after.params)))
    if before.file_bytes and after.file_bytes:
        old, new = before.file_bytes, after.file_bytes
        rows.append(("weights file", quantity(old, "B"), quantity(new, "B"), _kept(old, new)))
    if before.latency_ms and after.latency_ms:
        ratio = before.latency_ms / after.latency_ms
        change = f"{ratio:.2f} x as fast"
        rows.append((latency, f"{before.latency_ms:.2f} ms", f"{after.latency_ms:.2f} ms", change))
    return Table(title, ("", "before", "after", "change"), tuple(rows), frozenset({1, 2, 3}))


def channel_table(channels: ChannelMap) -> Table:
    """One row per channel group: its id, channels, member axes, and whether removing is exact."""
    rows = tuple((g.id, str(g.size), str(len(g.members)), "yes" if g.exact else _causes(g.effects)) for g in channels)
    title = f"{len(channels)} groups, {channels.cost.channels():,} channels that can go"
    return Table(title, ("group", "channels", "axes", "exact"), rows, frozenset({1, 2}))


def pinned_table(channels: ChannelMap) -> Table:
    """What must stay, one row per reason: an example, how many axes more, and where it comes from.

    Reasons that differ in the module alone (a line of code that many blocks run) share a row.
    """
    found: dict[tuple[str, str, str], list[PinnedAxis]] = {}
    for pin in channels.pinned:
        found.setdefault((pin.reason.text, pin.reason.operator, pin.reason.source), []).append(pin)
    rows = tuple((_part(pins[0]), f"+{len(pins) - 1}" if pins[1:] else "", _reason(pins)) for pins in found.values())
    title = f"{len(channels.pinned)} axes that stay, in whole or in part"
    return Table(title, ("axis", "more", "reason"), rows, frozenset({1}))


def branch_table(channels: ChannelMap) -> Table:
    """One row per residual branch that can be dropped: its id, the MACs that it alone saves, whether that is exact, what
    stays in its block, and the branch that contains it."""
    whole = channels.cost.macs()
    rows = []
    for branch in channels.branches:
        saved = whole - channels.cost.macs(drops=[branch.id])
        exact = "yes" if branch.exact else _causes(branch.effects)
        stays = "the input" if branch.shortcut == "identity" else "its shortcut"
        also = f", inside {branch.inside}" if branch.inside else ""
        rows.append((branch.id, quantity(saved), f"{saved / whole:.1%}" if whole else "", exact, stays + also))
    many = "branch" if len(rows) == 1 else "branches"
    title = f"{len(rows)} residual {many} that can be dropped whole"
    return Table(title, ("branch", "MACs saved", "of all", "exact", "what stays"), tuple(rows), frozenset({1, 2}))


def sum_table(channels: ChannelMap) -> Table:
    """Sums of which no side can be dropped, one row per reason: the module of one, how many more, and why."""
    found: dict[str, list[Reason]] = {}
    for reason in channels.sums:
        found.setdefault(reason.text, []).append(reason)
    rows = tuple(
        (same[0].module or "the model", f"+{len(same) - 1}" if same[1:] else "", str(same[0]))
        for same in found.values()
    )
    title = f"{len(channels.sums)} sum{'' if len(channels.sums) == 1 else 's'} of which no side can be dropped"
    return Table(title, ("in", "more", "reason"), rows, frozenset({1}))


def _part(pin: PinnedAxis) -> str:
    return str(pin.axis) if len(pin.positions) == pin.size else f"{pin.axis} ({len(pin.positions)} of {pin.size})"


def _reason(pins: Sequence[PinnedAxis]) -> str:
    others = len({pin.reason.module for pin in pins}) - 1
    also = f"; likewise in {others} other module{'s' if others > 1 else ''}" if others else ""
    return f"{pins[0].reason}{also}"


def quantity(value: float, unit: str = "") -> str:
    """A number with three to five digits and a decimal prefix.

    Example:
        >>> quantity(125_485_696), quantity(855_770), quantity(999), quantity(3_400_000, "B")
        ('125.49 M', '855.77 k', '999', '3.40 MB')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def _kept(before: float, after: float) -> str:
    return f"{after / before:.1%} kept" if before else ""


def _causes(effects: Sequence[str]) -> str:
    return "no: " + "; ".join(effects)
