"""The tracer: state of one labelled run, and the small vocabulary in which the operator rules are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.trace.graph import Graph
from attrim.trace.labels import Cell, Checker, Recorder, RuleNote, Value
from attrim.trace.where import Lines

__all__ = ["HEAD_COUNTS", "Attribute", "Option", "SiteKey", "Tracer"]

HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads", "num_key_value_heads",
               "num_kv_heads", "n_kv_heads", "h", "groups", "num_groups", "n_groups")  # fmt: skip
"""Names under which code keeps the number of blocks that a view splits an axis into."""

_RECENT = 16
"""How many operators back a width may come from that code computes a size with."""

_STACK_DEPTH = 3
"""How many enclosing modules are searched for the attribute that states a width."""


_NOWHERE = Lines(("", 0), ("", 0))


class SiteKey(NamedTuple):
    """One place in the code where a decision is made; shared by all modules that run the same line."""

    lines: Lines
    kind: str
    module_type: str
    detail: tuple[int, ...]


class Attribute(NamedTuple):
    """An int attribute of a module on the stack that equals a width."""

    path: str
    name: str
    value: int


@dataclass(slots=True)
class Option:
    """One way to read a size-bearing operator: what to do, and which labels a failure would implicate."""

    name: str
    action: Callable[[], Any]


@dataclass(slots=True)
class Tracer:
    """State of one labelled run.

    Attributes:
        book: takes notes (first run) or compares (run on a pruned network).
        decisions: for each site how many of its options have been tried and failed.
        sites: operator number -> sites that were decided there.
        steps: per operator its name, the shapes and values it returned and the values it was given, to find the first
            operator that goes astray in a pruned network.
        numbers: per operator the plain numbers among its arguments, if it is pointwise.
        inputs: the tensors that each module on the stack was called with.
        chosen: operator number -> names of the options that were taken there.
        guide: the recorded run that a run on a cut network follows, so that it reads every site in the same way.
        path: module that ran the last operator.
        running: an operator is being executed (so an error is its own).
        in_step: this operator has the same number and name as in the recorded run.
        sums: averages of the leaf modules' outputs, if they are to be collected.
        places: per operator its full name, module path and source line.
        taps: module outputs in order of execution.
        graph: who read what, in a recorded run.
    """

    book: Recorder | Checker
    decisions: Mapping[SiteKey, int] = field(default_factory=dict)
    sites: dict[int, list[tuple[SiteKey, int]]] = field(default_factory=dict)
    steps: list[tuple[str, list[tuple[tuple[int, ...], Value]], list[Value]]] = field(default_factory=list)
    chosen: dict[int, list[str]] = field(default_factory=dict)
    guide: Tracer | None = None
    in_step: bool = False
    running: bool = False
    path: str = ""
    sums: list[Tensor] | None = None
    places: list[tuple[str, str, str]] = field(default_factory=list)
    numbers: list[tuple[float, ...]] = field(default_factory=list)
    inputs: list[list[Value]] = field(default_factory=list)
    taps: list[tuple[str, nn.Module, Value]] = field(default_factory=list)
    stack: list[tuple[str, nn.Module]] = field(default_factory=list)
    graph: Graph | None = None
    op: int = -1
    operator: str = ""
    lines: Lines | None = None

    # -- values ---------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; an unseen one is a plain constant without labels."""
        found: Value | None = getattr(tensor, "_attrim_value", None)
        if found is None:
            found = Value((None,) * tensor.ndim, live=False)
        elif found.constant is not None and found.constant.live:
            found.live = True
        return found

    def set(
        self,
        tensor: Tensor,
        axes: Sequence[IntArray | None],
        live: bool,
        constant: Cell | None = None,
        free: frozenset[int] = frozenset(),
    ) -> None:
        """Attach labels to an output. A vector of zeros says nothing and is dropped."""
        clean = tuple(v if v is not None and v.any() else None for v in axes)
        tensor._attrim_value = Value(clean, live, constant, free)  # type: ignore[attr-defined]

    # -- notes ----------------------------------------------------------------------------------------------------

    def here(self, text: str) -> Reason:
        """A reason that points at the operator being run."""
        path = self.stack[-1][0] if self.stack else ""
        return Reason(text, self.operator, path, str(self.lines) if self.lines else "")

    def tie(self, a: IntArray | None, b: IntArray | None, text: str = "") -> None:
        """Positions go together; against an axis without labels, they stay."""
        if a is None and b is None:
            return
        if a is None or b is None:
            self.pin(b if a is None else a, text or "meets a tensor whose size does not follow the cut")
            return
        self.book.tie(a, b, self.here(text or "meets positions that must stay"))

    def pin(self, labels: IntArray | None, text: str) -> None:
        if labels is not None:
            self.book.pin(labels, self.here(text))

    def pin_all(self, values: Sequence[Value], text: str) -> None:
        for value in values:
            for vector in value.axes:
                self.pin(vector, text)

    def effect(self, labels: IntArray | None, text: str) -> None:
        if labels is not None:
            self.book.effect(labels, text)

    def role(self, labels: IntArray | None, role: str) -> None:
        if labels is not None:
            self.book.role(labels, role)

    def merge(self, table: IntArray, axis: int) -> IntArray:
        """Tie all entries of ``table`` that share an index on ``axis``; returns the vector along ``axis``."""
        rows = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
        first = np.ascontiguousarray(rows[:, 0])
        if rows.shape[1] > 1:
            rest = rows[:, 1:]
            self.tie(np.repeat(first, rest.shape[1]), np.ascontiguousarray(rest).ravel())
        return first

    # -- sites ----------------------------------------------------------------------------------------------------

    def decide(self, kind: str, options: Sequence[Option], detail: tuple[int, ...] = ()) -> Any:
        """Run the option that is due at this site; the probe moves a site on when its option fails."""
        module_type = type(self.stack[-1][1]).__qualname__ if self.stack else ""
        key = SiteKey(self.lines or _NOWHERE, kind, module_type, detail)
        taken = self.sites.setdefault(self.op, [])
        taken.append((key, len(options)))
        option = options[min(self.decisions.get(key, 0), len(options) - 1)]
        if self.guide is not None and self.in_step:
            names = self.guide.chosen.get(self.op, [])
            recorded = names[len(taken) - 1] if len(names) >= len(taken) else ""
            option = next((o for o in options if o.name == recorded), option)
        self.chosen.setdefault(self.op, []).append(option.name)
        return option.action()

    def recorded_options(self) -> Sequence[str]:
        """Names of the options that the recorded run took at this operator."""
        return self.guide.chosen.get(self.op, ()) if self.guide is not None and self.in_step else ()

    def guided_axes(self, ndim: int) -> list[int]:
        """The labelled axes of this operator's result in the recorded run, for where labels alone cannot tell."""
        if self.guide is None or not self.in_step:
            return []
        _, outs, _ = self.guide.steps[self.op]
        if not outs or len(outs[0][1].axes) != ndim:
            return []
        return [d for d, v in enumerate(outs[0][1].axes) if v is not None]

    def module_widths(self, size: int) -> list[IntArray]:
        """Label vectors of that length on the inputs of the enclosing modules and on recent results, the nearest first."""
        given = [value for values in reversed(self.inputs[-_STACK_DEPTH:]) for value in values]
        recent = [value for _, outs, _ in reversed(self.steps[-_RECENT:]) for _, value in outs]
        found = {id(v): v for value in (*given, *recent) for v in value.axes if v is not None and len(v) == size}
        return list(found.values())

    def attributes(self, size: int, names: Sequence[str] | None = None) -> list[Attribute]:
        """Int attributes of the enclosing modules that equal ``size``, the innermost module first."""
        found = []
        for path, module in reversed(self.stack[-_STACK_DEPTH:]):
            for name, value in vars(module).items():
                if name.startswith("_") or (names is not None and name not in names):
                    continue
                if type(value) is int and value == size:
                    found.append(Attribute(path, name, size))
                elif type(value) in (tuple, list) and names is None:
                    found += [
                        Attribute(path, f"{name}[{i}]", size)
                        for i, v in enumerate(value)
                        if type(v) is int and v == size
                    ]
        return found

    def follow(self, attribute: Attribute, vector: IntArray | None) -> None:
        """From now on ``attribute`` states how many positions of ``vector`` survive."""
        if vector is not None:
            self.book.rule(RuleNote(attribute.path, attribute.name, attribute.value, vector))
