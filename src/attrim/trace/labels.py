"""Channel labels: integers that name the positions of an axis, and the books that note what happens to them.

Label 0 is immortal: a position that can never go (a constant, a pad). Every other label belongs to one position of one
parameter or buffer axis. A traced tensor carries one label vector for each axis along which labels vary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from attrim.core.axes import Axis
from attrim.core.channels import Reason
from attrim.core.cost import IntArray

__all__ = ["Cell", "Checker", "Conflict", "CostTerm", "LabelSpace", "Recorder", "RuleNote", "Value"]


@dataclass(slots=True)
class Cell:
    """Shared by a freshly made tensor and all its views.

    Attributes:
        on: it still holds the same value everywhere.
        live: an activation was written into it.
    """

    on: bool = True
    live: bool = False


@dataclass(slots=True)
class Value:
    """What the trace knows about one tensor.

    Attributes:
        axes: per dimension the labels of its positions, shape ``(size,)``, or None where no label varies.
        live: computed from the network's inputs (an activation) rather than from parameters alone.
        constant: set for a tensor filled with one value: any part of it is as good as any other.
        free: axes that were expanded from size 1, so that their size follows whatever they meet.
    """

    axes: tuple[IntArray | None, ...]
    live: bool
    constant: Cell | None = None
    free: frozenset[int] = frozenset()

    @property
    def labelled(self) -> bool:
        return any(v is not None for v in self.axes)

    @property
    def uniform(self) -> bool:
        return self.constant is not None and self.constant.on

    def indifferent(self, dim: int) -> bool:
        """Whether the size of an unlabelled axis follows whatever it meets."""
        return self.uniform or dim in self.free


class CostTerm(NamedTuple):
    """``coefficient · Π widths``; a factor is the label vector of an axis. ``op`` is the operator that was counted."""

    coefficient: int
    factors: tuple[IntArray, ...]
    op: int = -1


class RuleNote(NamedTuple):
    """A module attribute whose value is the number of surviving positions of ``vector``."""

    module: str
    attribute: str
    before: int
    vector: IntArray


@dataclass(frozen=True, slots=True)
class Conflict:
    """A place where a pruned network would combine positions that do not belong together."""

    reason: Reason
    op: int = -1

    def __str__(self) -> str:
        return str(self.reason)


class LabelSpace:
    """Hands out labels to axes: axis ``k`` owns the labels ``start[k] … start[k] + size[k] - 1``."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.start: list[int] = []
        self.size: list[int] = []
        self.total = 1

    def add(self, axis: Axis, size: int) -> IntArray:
        self.axes.append(axis)
        self.start.append(self.total)
        self.size.append(size)
        labels = np.arange(self.total, self.total + size, dtype=np.int64)
        self.total += size
        return labels


@dataclass(slots=True)
class Recorder:
    """The book of the first run: notes every tie, pin, effect, role and cost; judges nothing."""

    left: list[IntArray] = field(default_factory=list)
    right: list[IntArray] = field(default_factory=list)
    pins: list[tuple[IntArray, Reason]] = field(default_factory=list)
    effects: list[tuple[IntArray, str]] = field(default_factory=list)
    roles: list[tuple[IntArray, str]] = field(default_factory=list)
    costs: list[CostTerm] = field(default_factory=list)
    rules: list[RuleNote] = field(default_factory=list)

    def tie(self, a: IntArray, b: IntArray, reason: Reason) -> None:
        """Positions ``a[i]`` and ``b[i]`` can only go together."""
        if a is b:
            return
        mortal = (a != 0) & (b != 0)
        if not mortal.all():
            lone = np.concatenate([a[(b == 0) & (a != 0)], b[(a == 0) & (b != 0)]])
            if lone.size:
                self.pins.append((lone, reason))
            a, b = a[mortal], b[mortal]
        self.left.append(a)
        self.right.append(b)

    def pin(self, labels: IntArray, reason: Reason) -> None:
        """These positions must stay."""
        self.pins.append((labels, reason))

    def effect(self, labels: IntArray, text: str) -> None:
        self.effects.append((labels, text))

    def role(self, labels: IntArray, role: str) -> None:
        self.roles.append((labels, role))

    def cost(self, coefficient: int, factors: tuple[IntArray, ...], op: int = -1) -> None:
        self.costs.append(CostTerm(coefficient, factors, op))

    def rule(self, note: RuleNote) -> None:
        self.rules.append(note)


@dataclass(slots=True)
class Checker:
    """The book of a run on a pruned network whose tensors carry the survivors' units: any unequal tie is a conflict."""

    conflicts: list[Conflict] = field(default_factory=list)
    costs: list[CostTerm] = field(default_factory=list)
    op: int = -1

    def tie(self, a: IntArray, b: IntArray, reason: Reason) -> None:
        if a is b:
            return
        if a.shape != b.shape or (a != b).any():
            self._conflict("combines positions of different channels", reason)

    def pin(self, labels: IntArray, reason: Reason) -> None:
        # a single survivor looks like an axis without labels wherever its size is 1; it cannot be out of order
        if (labels != labels[0]).any():
            self._conflict(reason.text, reason)

    def effect(self, labels: IntArray, text: str) -> None:
        pass

    def role(self, labels: IntArray, role: str) -> None:
        pass

    def cost(self, coefficient: int, factors: tuple[IntArray, ...], op: int = -1) -> None:
        self.costs.append(CostTerm(coefficient, factors, op))

    def rule(self, note: RuleNote) -> None:
        pass

    def _conflict(self, text: str, reason: Reason) -> None:
        self.conflicts.append(Conflict(Reason(text, reason.operator, reason.module, reason.source), self.op))
