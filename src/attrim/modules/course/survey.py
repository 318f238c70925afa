"""The course of a network: every contraction, and the place after it where its output is best compared."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.plan import within
from attrim.modules.course.chain import Step, affine_of, is_addition, is_rectifier, step_of, undo_movements
from attrim.modules.course.contractions import Contraction, ContractionWatch
from attrim.modules.course.rows import output_rows, places
from attrim.modules.course.units import Course, Key, Unit
from attrim.modules.names import named_tensors

__all__ = ["Course", "Key", "Survey", "Unit", "bias_of", "is_flipped"]

_VIEWS = frozenset(
    {"t", "view", "_unsafe_view", "transpose", "permute", "detach", "slice", "split", "split_with_sizes"}
)
_VIEWS |= frozenset({"chunk", "unbind", "select", "alias", "reshape", "unsqueeze", "squeeze", "expand"})

_SUMS = frozenset({"add", "add_", "sub", "cat"})


@dataclass(slots=True, eq=False)
class _Trail:
    """A contraction and what was seen to follow it; holds no activation, a survey costs no more memory than a pass.

    What follows are the tensors "0" (its output), "1" (after the first step), and so on; the last may be the sum.
    """

    use: Contraction
    flipped: bool
    bias: Tensor | None
    at: Tensor
    before: Tensor
    order: int
    plain: bool
    source: weakref.ref[Tensor]
    version: int
    clocks: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    joined: int = -1
    total: int = -1
    relu_after: dict[int, bool] = field(default_factory=dict)
    sum_uses: list[tuple[bool, bool]] = field(default_factory=list)
    checked: list[bool] = field(default_factory=list)


def is_flipped(use: Contraction, args: Sequence[Any], name: str) -> bool:
    """Whether the weight is the left factor of the matrix product that was called."""
    if name == "convolution":
        return False
    left = args[1] if name == "addmm" else args[0]
    return bool(left.untyped_storage().data_ptr() == use.weight.untyped_storage().data_ptr())


def bias_of(args: Sequence[Any], name: str) -> Tensor | None:
    """The bias of a convolution or of ``addmm``."""
    if name == "convolution":
        found: Tensor | None = args[2]
        return found
    return args[0] if name == "addmm" else None


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors are not counted."""
    return 0 if tensor.is_inference() else tensor._version


class Survey(ContractionWatch):  # type: ignore[no-untyped-call]
    """While active, notes the course of one forward pass; :meth:`course` tells it."""

    def __init__(self, model: nn.Module) -> None:
        named = named_tensors(model)
        weights = {n: named.tensors[n] for n in named.parameters if named.tensors[n].ndim > 1}
        super().__init__(weights, self._note)
        self._constants = {t.untyped_storage().data_ptr() for t in named.tensors.values()}
        self._uses: dict[int, int] = {}
        self._weights = {t.untyped_storage().data_ptr(): n for n, t in weights.items()}
        self._users: dict[str, set[str]] = {}
        self._seen: list[Contraction] = []
        self._trails: list[_Trail] = []
        self._tail_of: dict[int, tuple[_Trail, int]] = {}
        self._sum_of: dict[int, list[_Trail]] = {}
        self._alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._clock = 0
        self._live: dict[int, int] = {}

    def _note(self, use: Contraction) -> None:
        self._seen.append(use)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._seen.clear()
        self._clock += 1
        self._count(func, args)
        followed = self._followed(func, args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        value = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(value, Tensor):
            self._advance(followed, func, args, kwargs, value)
            self._track(value, bool(followed))
            for use in self._seen:
                self._begin(use, func.overloadpacket.__name__, args, kwargs, value)
        return result

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        """How often each parameter or buffer is used by something else than a view."""
        if func.overloadpacket.__name__ in _VIEWS:
            return
        for value in args:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._constants:
                    self._uses[tensor.data_ptr()] = self._uses.get(tensor.data_ptr(), 0) + 1
                    weight = self._weights.get(tensor.untyped_storage().data_ptr(), "")
                    self._users.setdefault(weight, set()).add(func.overloadpacket.__name__)

    def _followed(self, func: Any, args: tuple[Any, ...]) -> list[tuple[_Trail, int, Tensor]]:
        """Trails whose last tensor is an input of the call; each gets one use more."""
        found = []
        for value in args:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                if id(tensor) in self._tail_of:
                    trail, index = self._tail_of[id(tensor)]
                    trail.counts[index] += 1
                    read = trail.source()
                    if read is None or _version(read) == trail.version:  # a fit at this point would read other inputs
                        found.append((trail, index, tensor))
                for trail in self._sum_of.get(id(tensor), ()):
                    in_place = func.overloadpacket.__name__.endswith("_")
                    trail.sum_uses.append((is_rectifier(func, args), in_place))
        return found

    def _advance(
        self, followed: list[tuple[_Trail, int, Tensor]], func: Any, args: tuple[Any, ...], kwargs: Any, value: Tensor
    ) -> None:
        name = func.overloadpacket.__name__
        for trail, index, tail in followed:
            if index != len(trail.counts) - 1 or trail.counts[index] > 1 or trail.joined >= 0:
                continue
            if is_rectifier(func, args):
                trail.relu_after[index] = name.endswith("_")
                continue
            step = step_of(func, args, kwargs, tail, self._constants)
            if step is not None:
                self._append(trail, step, value)
            elif is_addition(func, args, kwargs):
                trail.joined, trail.total = index, self._clock
                self._tail_of.pop(id(value), None)  # an in-place sum is no longer the branch
                if id(value) not in self._sum_of:
                    self._sum_of[id(value)] = []
                    weakref.finalize(value, self._sum_of.pop, id(value), None)
                self._sum_of[id(value)].append(trail)
                self._extend(trail)

    def _append(self, trail: _Trail, step: Step, value: Tensor) -> None:
        trail.steps.append(step)
        self._extend(trail)
        trail.checked.append(self._is_affine(trail, value))
        self._follow(trail, value)

    def _follow(self, trail: _Trail, value: Tensor) -> None:
        """Know ``value`` when it is used; an entry goes with its tensor, whose number may then be given anew."""
        if id(value) not in self._tail_of:
            weakref.finalize(value, self._tail_of.pop, id(value), None)
        self._tail_of[id(value)] = (trail, len(trail.counts) - 1)

    def _extend(self, trail: _Trail) -> None:
        trail.counts.append(0)
        trail.clocks.append(self._clock)

    def _is_affine(self, trail: _Trail, value: Tensor) -> bool:
        """Whether the steps so far are what they seem, in numbers."""
        affine = affine_of(trail.steps, trail.before.shape[1], trail.before.device)
        if affine is None:
            return False
        try:
            found = output_rows(undo_movements(value, trail.steps), trail.use, trail.at, trail.flipped).double()
        except RuntimeError:
            return False
        expected = trail.before * affine[0] + affine[1]
        scale = expected.abs().amax().clamp_min(1e-12)
        return bool(((found - expected).abs().amax() / scale) < 1e-3)

    def _track(self, value: Tensor, followed: bool) -> None:
        """Bytes of activations that Python still holds."""
        if value.untyped_storage().data_ptr() not in self._constants:
            storage = value.untyped_storage()
            self._alive[id(value)] = (weakref.ref(value), storage.data_ptr())
        if self._seen or followed:
            alive: dict[int, int] = {}
            for key, (ref, address) in list(self._alive.items()):
                tensor = ref()
                if tensor is None:
                    del self._alive[key]
                else:
                    alive[address] = tensor.untyped_storage().nbytes()
            self._live[self._clock] = sum(alive.values())

    def _begin(self, use: Contraction, name: str, args: tuple[Any, ...], kwargs: Any, value: Tensor) -> None:
        flipped = is_flipped(use, args, name)
        total = len(use.inputs) * use.outputs
        at = places(total, 64, 0)
        if use.window is None and name == "convolution":  # a transposed convolution spreads, its rows are no outputs
            before = torch.zeros(0, 0)
        else:
            before = output_rows(value, use, at, flipped).double()
        bias = bias_of(args, name)
        if bias is not None and bias.untyped_storage().data_ptr() not in self._constants:
            bias = None
        light = replace(use, inputs=torch.empty(use.inputs.shape, dtype=use.inputs.dtype, device="meta"))
        plain = all(factor == 1 for factor in kwargs.values())  # beta and alpha of ``addmm``
        read = args[(name == "addmm") + flipped]
        read = read if read._base is None else read._base
        trail = _Trail(light, flipped, bias, at, before, len(self._trails), plain, weakref.ref(read), _version(read))
        self._extend(trail)
        self._trails.append(trail)
        self._follow(trail, value)

    def course(
        self,
        cut: Mapping[str, Collection[int]],
        *,
        without: Collection[str] = (),
        limits: Mapping[Key, int] | None = None,
    ) -> Course:
        """What was seen.

        Args:
            cut: weight -> its dimensions that are cut. Where a sum takes two contractions together, it counts as the
                place of comparison of the one whose inputs were cut, or else of the first.
            without: modules that another network to be compared with lacks; their weights are no units.
            limits: unit -> the most operators between it and its place of comparison, then before any sum.
        """
        refused: dict[str, str] = {}
        claimed: set[int] = set()
        found: list[tuple[int, Unit]] = []
        keys = self._keys()
        calls = Counter(keys)
        order = sorted(
            zip(self._trails, keys, strict=True), key=lambda p: (p[0].use.dim not in cut.get(p[1][0], ()), p[0].order)
        )
        for trail, key in order:
            if within(key[0], without):
                continue
            why = self._refusal(trail, calls[key])
            if why:
                refused[trail.use.tensor] = why
                continue
            end, unit = self._unit(trail, key, claimed, (limits or {}).get(key))
            found.append((end, unit))
        found.sort(key=lambda pair: pair[0])
        dims: dict[str, frozenset[int]] = {}
        for trail in self._trails:
            dims[trail.use.tensor] = dims.get(trail.use.tensor, frozenset()) | {trail.use.dim}
        added = frozenset(name for name, users in self._users.items() if users <= _SUMS)
        return Course(tuple(unit for _, unit in found), refused, dims, added)

    def _keys(self) -> list[Key]:
        parts: dict[str, dict[int, int]] = {}
        keys = []
        for trail in self._trails:
            numbers = parts.setdefault(trail.use.tensor, {})
            keys.append((trail.use.tensor, numbers.setdefault(trail.use.offset, len(numbers))))
        return keys

    def _refusal(self, trail: _Trail, calls: int) -> str:
        if trail.before.numel() == 0:
            return "a transposed convolution"
        if calls > 1:
            return f"runs {calls} times in a forward pass; a fit for one call would change the others"
        if self._uses.get(trail.use.weight.data_ptr(), 0) > 1:
            return "its weight is used elsewhere too"
        return "" if trail.plain else "its product is multiplied by a factor in the same call"

    def _unit(self, trail: _Trail, key: Key, claimed: set[int], limit: int | None) -> tuple[int, Unit]:
        length, most = 0, len(trail.steps) if limit is None else limit
        while length < min(most, len(trail.steps)) and trail.counts[length] == 1 and trail.checked[length]:
            length += 1
        join = limit is None and length == len(trail.steps) == trail.joined and trail.counts[length] == 1
        if join:
            join = trail.total not in claimed
            claimed.add(trail.total)
        if join:
            first = trail.sum_uses[0] if trail.sum_uses else (False, False)
            rectified = first[0] and (first[1] or len(trail.sum_uses) == 1)
        else:
            rectified = length in trail.relu_after and (trail.counts[length] == 1 or trail.relu_after[length])
        blocks, rows, columns, taps = trail.use.weight.shape
        bias = trail.bias
        maps = [i for i, step in enumerate(trail.steps[:length]) if step.kind not in ("move", "same")]
        if bias is None and maps and trail.steps[maps[0]].kind == "shift":
            added = trail.steps[maps.pop(0)].other
            bias = added if isinstance(added, Tensor) and self._alone(added, blocks * rows) else None
            maps = [] if bias is None else maps
        norm = maps[0] if maps else -1
        return trail.clocks[length + join], Unit(
            key=key,
            offset=trail.use.offset,
            dim=trail.use.dim,
            steps=length,
            join=join,
            rectified=rectified,
            flipped=trail.flipped,
            outputs=blocks * rows,
            block_outputs=rows,
            columns=columns * taps,
            places=len(trail.use.inputs) * trail.use.outputs,
            bias=bias is not None and self._alone(bias, blocks * rows),
            norm=norm if norm >= 0 and self._takes_bias(trail.steps[norm], blocks * rows) else -1,
            live=self._live.get(trail.clocks[length + join], 0)
            + trail.use.inputs.numel() * trail.use.inputs.element_size(),
        )

    def _alone(self, tensor: Tensor, size: int) -> bool:
        constant = tensor.untyped_storage().data_ptr() in self._constants
        return constant and tensor.numel() == size and self._uses.get(tensor.data_ptr(), 0) == 1

    def _takes_bias(self, step: Step, size: int) -> bool:
        return step.kind == "norm" and self._alone(step.norm.mean, size)
