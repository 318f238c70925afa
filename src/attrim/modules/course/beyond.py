"""Where residual branches are gone: the later sums that the layers before them should meet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attrim.core.plan import within
from attrim.modules.course.chain import is_addition, is_rectifier
from attrim.modules.course.follow import Arrival, Follow
from attrim.modules.course.units import Key, Unit
from attrim.modules.names import named_tensors

__all__ = ["Beyond", "FollowFar", "Stream"]


@dataclass(frozen=True, slots=True)
class Beyond:
    """What the dense network says about branches that the pruned one lacks.

    Attributes:
        sums: unit -> number of the plain sum (from 1, in order of the forward pass) whose value stands, in the dense
            network, where the pruned network has the unit's own: the sum behind the last dropped branch. Not where a
            single unit follows, the classifier: it makes good more by itself.
        absorbing: units that are to meet what a dropped branch added.
        untouched: units that are compared before any dropped branch begins.
    """

    sums: Mapping[Key, int]
    absorbing: frozenset[Key]
    untouched: frozenset[Key]


class Stream(Follow):  # type: ignore[no-untyped-call]
    """While active on the dense network, follows each unit's value along sums with branches that are to go.

    After ``y = x + F(x)`` has become ``y = x``, whoever read ``y`` reads ``x``: so the layer that makes ``x`` should make
    ``y``. That holds as long as nothing else that stays reads ``x``; between the two only ReLUs may run.

    Args:
        model: the dense network.
        units: of its course.
        drops: paths of the modules that go.

    Example:
        >>> stream = Stream(model, course.units, plan.drops)
        >>> with stream.inside(model), stream:
        ...     outputs = model(x)
        >>> beyond = stream.beyond(outputs)
    """

    def __init__(self, model: nn.Module, units: Iterable[Unit], drops: Collection[str]) -> None:
        super().__init__(model, units, self._note_arrival)
        tensors = named_tensors(model).tensors
        self._drops = drops
        self._lost = {t.untyped_storage().data_ptr() for name, t in tensors.items() if within(name, drops)}
        self._depth = self._number = 0
        self._begun = False
        self._joining: list[Key] = []
        self._arrived: list[Key] = []
        self._before: set[Key] = set()
        self._absorbing: set[Key] = set()
        self._stages: dict[Key, list[tuple[int, int]]] = {}
        self._read: dict[Key, int] = {}
        self._values: dict[int, tuple[weakref.ref[Tensor], Key, int]] = {}
        self._branches: dict[int, weakref.ref[Tensor]] = {}

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """A block in which it is known whether a module that goes is running."""

        def enter(module: nn.Module, args: Any) -> None:
            self._depth += 1

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._depth -= 1

        handles = []
        for path, module in model.named_modules():
            if path in self._drops:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in _flat(args) if isinstance(t, Tensor)]
        gone = self._depth > 0 or any(t.untyped_storage().data_ptr() in self._lost for t in inputs)
        self._begun |= gone
        summed = is_addition(func, args, kwargs)
        self._number += summed
        known = [self._value(t) for t in inputs]
        branch = [self._is_branch(t) for t in inputs]
        self._joining.clear()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        value = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(value, Tensor):
            return result
        self._branches.pop(id(value), None)
        if summed and sum(branch) == 1:
            self._behind(value, known[branch.index(False)])
        elif is_rectifier(func, args) and known[0] is not None:
            self._set(value, *known[0])
        else:
            if not gone:
                self._note_readers(known)
            if gone or (any(branch) and (not summed or all(branch))):
                for tensor in _flat((result,)):
                    if isinstance(tensor, Tensor):
                        self._branches[id(tensor)] = weakref.ref(tensor)
        for key in self._joining:
            if summed and any(branch):
                self._absorbing.add(key)
            self._start(value, key)
        return result

    def beyond(self, outputs: Any) -> Beyond:
        """What was found, once the network has returned ``outputs``."""
        self._note_readers([self._value(t) for t in _flat((outputs,)) if isinstance(t, Tensor)])
        sums: dict[Key, int] = {}
        absorbing = set(self._absorbing)
        for key, stages in self._stages.items():
            stage = min(self._read.get(key, len(stages)), len(stages))
            if stage:
                number, arrived = stages[stage - 1]
                behind = self._arrived[arrived:]
                sums |= {key: number} if len(behind) != 1 else {}
                absorbing.add(key if len(behind) != 1 else behind[0])
        return Beyond(sums, frozenset(absorbing), frozenset(self._before - absorbing))

    def _note_arrival(self, arrival: Arrival) -> None:
        key = arrival.unit.key
        self._arrived.append(key)
        if not self._begun:
            self._before.add(key)
        if arrival.unit.join:
            self._joining.append(key)
        else:
            self._start(arrival.tail, key)

    def _start(self, value: Tensor, key: Key) -> None:
        self._stages[key] = []
        self._set(value, key, 0)

    def _behind(self, value: Tensor, stream: tuple[Key, int] | None) -> None:
        """A branch that goes was added to a unit's value."""
        if stream is not None:
            key = stream[0]
            self._stages[key].append((self._number, len(self._arrived)))
            self._set(value, key, len(self._stages[key]))

    def _note_readers(self, known: Iterable[tuple[Key, int] | None]) -> None:
        for found in known:
            if found is not None:
                self._read[found[0]] = min(found[1], self._read.get(found[0], found[1]))

    def _set(self, value: Tensor, key: Key, stage: int) -> None:
        self._values[id(value)] = weakref.ref(value), key, stage

    def _value(self, tensor: Tensor) -> tuple[Key, int] | None:
        ref, key, stage = self._values.get(id(tensor), (None, ("", 0), 0))
        return (key, stage) if ref is not None and ref() is tensor else None

    def _is_branch(self, tensor: Tensor) -> bool:
        ref = self._branches.get(id(tensor))
        return ref is not None and ref() is tensor


class FollowFar(Follow):  # type: ignore[no-untyped-call]
    """Like :class:`Follow`, but some units are only shown once a later sum is about to be taken, with its two sides.

    Args:
        model, units, arrive: see :class:`Follow`.
        sums: unit -> number of the sum; see :class:`Beyond`.
    """

    def __init__(
        self, model: nn.Module, units: Iterable[Unit], arrive: Callable[[Arrival], None], sums: Mapping[Key, int]
    ) -> None:
        super().__init__(model, units, self._hold)
        self._show, self._sums = arrive, sums
        self._waiting: dict[int, list[Arrival]] = {}
        self._number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_addition(func, args, kwargs or {}):
            self._number += 1
            for arrival in self._waiting.pop(self._number, ()):
                arrival.tail, arrival.other = args
                self._show(arrival)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _hold(self, arrival: Arrival) -> None:
        number = self._sums.get(arrival.unit.key)
        if number is None:
            self._show(arrival)
        else:
            self._waiting.setdefault(number, []).append(arrival)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Mapping):
            yield from _flat(value.values())
        elif isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
