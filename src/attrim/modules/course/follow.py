"""Following a network up to the places where the outputs of its contractions are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attrim.modules.course.chain import Norm, Step, affine_of, is_addition, step_of, undo_movements
from attrim.modules.course.contractions import Contraction, ContractionWatch
from attrim.modules.course.rows import input_rows, output_rows
from attrim.modules.course.survey import Unit, bias_of
from attrim.modules.names import named_tensors

__all__ = ["Arrival", "Follow", "Site"]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """The tensors of a unit that a fit writes to.

    Attributes:
        unit: which one.
        weight: ``(blocks, rows, columns, taps)``, a view.
        bias: of the contraction, or None.
        norm: the batch norm that can take up a bias, or None.
        scale, shift: what the way from the bias to the comparison does to each output, float64, ``(outputs,)``.
    """

    unit: Unit
    weight: Tensor
    bias: Tensor | None
    norm: Norm | None
    scale: Tensor
    shift: Tensor


@dataclass(slots=True, eq=False)
class Arrival:
    """A contraction whose output has come to the place of comparison.

    Attributes:
        unit: which one.
        use: the contraction, with its inputs and a view of the weight that can be written to.
        bias: the bias that the contraction or the first map behind it adds.
        tail: its output there, before a sum with another branch.
        other: the other branch, or None.
        steps: what lies between.
        bias_step: the step that adds the bias, or -1.
    """

    unit: Unit
    use: Contraction
    func: Any
    args: tuple[Any, ...]
    bias: Tensor | None
    tail: Tensor
    steps: list[Step] = field(default_factory=list)
    other: Tensor | None = None
    bias_step: int = -1

    def inputs(self, at: Tensor) -> Tensor:
        """What the positions ``at`` read: ``(len(at), blocks, columns, taps)``."""
        return input_rows(self.use, at)

    def values(self, at: Tensor) -> Tensor:
        """What is found at the place of comparison, for the positions ``at``: ``(len(at), outputs)``."""
        total = self._rows(self.tail, at)
        return total if self.other is None else total + self._rows(self.other, at)

    def branch(self, at: Tensor) -> Tensor:
        """The same without the other branch."""
        return self._rows(self.tail, at)

    def _rows(self, value: Tensor, at: Tensor) -> Tensor:
        return output_rows(undo_movements(value, self.steps), self.use, at, self.unit.flipped)

    @property
    def places(self) -> int:
        """Output positions in this batch."""
        return len(self.use.inputs) * self.use.outputs

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each output on the way behind the bias, float64."""
        steps = [step for i, step in enumerate(self.steps) if i != self.bias_step]
        found = affine_of(steps, self.unit.outputs, self.tail.device)
        if found is None:  # the survey let only affine ways through
            raise RuntimeError(f"the way behind '{self.unit.key[0]}' is not affine")
        return found

    @property
    def norm(self) -> Norm | None:
        """The batch norm that can take up a bias."""
        return self.steps[self.unit.norm].norm if self.unit.norm >= 0 else None

    def site(self) -> Site:
        """What a fit writes to, without the activations."""
        return Site(self.unit, self.use.weight, self.bias, self.norm, *self.affine())

    def renew(self) -> None:
        """Compute the output again with the weights as they are now."""
        value = self.func(*self.args)
        for step in self.steps:
            value = step.run(value)
        self.tail.copy_(value)


class Follow(ContractionWatch):  # type: ignore[no-untyped-call]
    """While active, calls ``arrive`` for every unit that a forward pass comes to, before a sum is taken.

    ``arrive`` may change the unit's weights and call :meth:`Arrival.renew`.
    """

    def __init__(self, model: nn.Module, units: Iterable[Unit], arrive: Callable[[Arrival], None]) -> None:
        named = named_tensors(model)
        self._units = {(unit.key[0], unit.offset): unit for unit in units}
        names = {name for name, _ in self._units}
        super().__init__({n: t for n, t in named.tensors.items() if n in names}, self._note)
        self._constants = {t.untyped_storage().data_ptr() for t in named.tensors.values()}
        self._arrive = arrive
        self._seen: list[Contraction] = []
        self._open: dict[int, Arrival] = {}

    def _note(self, use: Contraction) -> None:
        self._seen.append(use)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._seen.clear()
        steps = [(self._open.pop(id(a)), a) for a in args if isinstance(a, Tensor) and id(a) in self._open]
        for trail, _ in steps:
            self._join(trail, func, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        value = result[0] if isinstance(result, tuple | list) and result else result
        for trail, source in steps:
            if len(trail.steps) < trail.unit.steps:
                step = step_of(func, args, kwargs, source, self._constants)
                if step is not None:
                    if step.kind == "shift" and trail.bias is None and trail.unit.bias:
                        trail.bias, trail.bias_step = torch.as_tensor(step.other), len(trail.steps)
                    trail.steps.append(step)
                    trail.tail = value
                    self._go_on(trail)
        for use in self._seen:
            unit = self._units.get((use.tensor, use.offset))
            if unit is not None:
                bias = bias_of(args, func.overloadpacket.__name__)
                if bias is not None and bias.untyped_storage().data_ptr() not in self._constants:
                    bias = None  # the other branch of a sum
                self._go_on(Arrival(unit, use, func, args, bias, value))
        return result

    def _join(self, trail: Arrival, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if len(trail.steps) == trail.unit.steps and trail.unit.join and is_addition(func, args, kwargs):
            trail.other = args[1] if args[0] is trail.tail else args[0]
            self._arrive(trail)

    def _go_on(self, trail: Arrival) -> None:
        if len(trail.steps) == trail.unit.steps and not trail.unit.join:
            self._arrive(trail)
        else:
            self._open[id(trail.tail)] = trail
