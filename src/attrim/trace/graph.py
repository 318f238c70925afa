"""The graph of a recorded run: which operator read which value, and which module was given and returned what.

A value is a tensor at one moment: an operator that works in place makes a new value of the tensor it was given. A view and
its base share memory, so whoever reads the one after a write into the other reads that write as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from attrim.core.cost import IntArray
from attrim.trace.call import Call, tensors_in

__all__ = ["Graph", "ModuleCall", "Node", "Op"]

_NAMELESS = "?"
"""Stands for a module that is not one of the model's."""

Steps = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Node:
    """A value: the operator that made it (-1: a parameter, a buffer, an input), and what is known of it."""

    op: int
    shape: tuple[int, ...]
    live: bool
    axes: tuple[IntArray | None, ...]
    readers: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Op:
    """One counted operator.

    Attributes:
        name: base name, as in the rules.
        path, line: module that ran it, and source line.
        reads: values read, views' hidden writes included.
        makes: values made.
        operands: for a sum of two tensors the two values, else empty.
        plain: the sum adds (or subtracts) its second operand as it is, without a factor.
        bounds: for a clamp (ReLU, ReLU6, hardtanh) its limits.
        window: length of each spatial dimension as ``(m, a, b)``, for convolutions and pools.
        numbers: plain numbers among the arguments.
    """

    name: str
    path: str
    line: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    operands: tuple[int, ...] = ()
    plain: bool = True
    bounds: tuple[float, float] | None = None
    window: Steps | None = None


@dataclass(slots=True)
class ModuleCall:
    """One call of a module: operators ``first … last - 1`` ran inside.

    Attributes:
        given: the values of the tensors among its positional arguments, or if there are none its keyword arguments.
        single: it was called with one positional tensor and nothing else.
        returned: values of the tensors in its result, None for anything else, one entry if it is not a tuple.
        is_tuple: the result is a tuple or list.
        inert: an ``nn.Identity`` or an empty ``nn.Sequential``, which do nothing in training either.
    """

    path: str
    first: int
    last: int
    given: tuple[int, ...]
    single: bool
    returned: tuple[int | None, ...] = ()
    is_tuple: bool = False
    inert: bool = False


class Graph:
    """Built while a run is recorded."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.ops: list[Op] = []
        self.calls: list[ModuleCall] = []
        self.tensors: dict[str, int] = {}
        self._open: list[ModuleCall] = []
        self._written: dict[int, tuple[StorageWeakRef, int]] = {}
        self._reads: list[int] = []

    def name(self, tensor: Tensor, name: str, axes: tuple[IntArray | None, ...]) -> None:
        """A parameter or buffer."""
        self.tensors[name] = self._new(tensor, -1, False, axes)

    def node(self, tensor: Tensor) -> int:
        """The value that a tensor holds now; an unseen one came from outside."""
        found: int | None = getattr(tensor, "_attrim_node", None)
        if found is None:
            value = getattr(tensor, "_attrim_value", None)
            found = self._new(tensor, -1, bool(value and value.live), value.axes if value else (None,) * tensor.ndim)
        return found

    def values(self, tensor: Tensor) -> list[int]:
        """The value of a tensor, and the last write into its memory through another view."""
        number = self.node(tensor)
        later = self._written.get(tensor.untyped_storage()._cdata) if self._written else None
        return [number] if later is None or self.nodes[later[1]].op <= self.nodes[number].op else [number, later[1]]

    def _new(self, tensor: Tensor, op: int, live: bool, axes: tuple[IntArray | None, ...]) -> int:
        number = len(self.nodes)
        self.nodes.append(Node(op, tuple(tensor.shape), live, axes))
        tensor._attrim_node = number  # type: ignore[attr-defined]
        return number

    # -- operators --------------------------------------------------------------------------------------------------

    def before(self, call: Call) -> None:
        """Note what an operator is about to read; an in-place one changes it."""
        self._reads = list(dict.fromkeys(n for tensor in call.inputs for n in self.values(tensor)))

    def copied(self, call: Call) -> None:
        """A copy holds the value of what was copied."""
        for out in call.outputs:
            if self._reads and tuple(out.shape) == self.nodes[self._reads[0]].shape:
                out._attrim_node = self._reads[0]  # type: ignore[attr-defined]

    def after(self, call: Call, path: str, line: str) -> None:
        """Note the operator that has just run."""
        number = len(self.ops)
        operands = _operands(self, call) if call.name in ("add", "sub") else ()
        in_place = call.func._schema.is_mutable
        makes = []
        for out in call.outputs:
            value = out._attrim_value  # type: ignore[attr-defined]
            makes.append(self._new(out, number, value.live, value.axes))
            if in_place:
                storage = out.untyped_storage()
                self._written[storage._cdata] = (StorageWeakRef(storage), makes[-1])  # type: ignore[no-untyped-call]
        for read in self._reads:
            self.nodes[read].readers.append(number)
        plain = not call.kwargs or call.kwargs.get("alpha", 1) == 1
        self.ops.append(
            Op(call.name, path, line, tuple(self._reads), tuple(makes), operands, plain, _bounds(call), _window(call))
        )

    # -- modules ----------------------------------------------------------------------------------------------------

    def enter(self, path: str | None, module: nn.Module, args: Any) -> None:
        """A module is called; one without a path was made on the way and belongs to whoever made it."""
        tensors = tensors_in(args)
        single = len(args) == 1 and isinstance(args[0], Tensor)
        inert = _inert(module)
        self._open.append(
            ModuleCall(
                _NAMELESS if path is None else path,
                len(self.ops),
                -1,
                tuple(self.node(x) for x in tensors),
                single,
                inert=inert,
            )
        )

    def leave(self, kwargs: Any, out: Any) -> None:
        """The module that was entered last returns."""
        call = self._open.pop()
        call.single = call.single and not kwargs
        call.given = call.given or tuple(self.node(x) for x in tensors_in(kwargs))
        call.last = len(self.ops)
        call.is_tuple = isinstance(out, (tuple, list))
        items = out if call.is_tuple else (out,)
        call.returned = tuple(self.node(x) if isinstance(x, Tensor) else None for x in items)
        if call.path != _NAMELESS:
            self.calls.append(call)


def _inert(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Sequential and all(map(_inert, module)))


def _operands(graph: Graph, call: Call) -> tuple[int, ...]:
    a, b = call["self"], call["other"]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        return ()
    pair = (graph.node(a), graph.node(b))  # as they were: results are named after this
    return pair if all(graph.nodes[n].live for n in pair) else ()


def _bounds(call: Call) -> tuple[float, float] | None:
    if call.name == "relu":
        return 0.0, float("inf")
    if call.name == "relu6":
        return 0.0, 6.0
    if call.name == "hardtanh":
        return float(call["min_val"]), float(call["max_val"])
    if call.name == "clamp_min" and isinstance(call["min"], (int, float)):
        return float(call["min"]), float("inf")
    return None


def _window(call: Call) -> Steps | None:
    """What a convolution or a pool does to the lengths of its spatial dimensions."""
    if call.name == "convolution":
        kernel = tuple(call["weight"].shape[2:])
        stride, padding, dilation = (_each(call[n], len(kernel)) for n in ("stride", "padding", "dilation"))
        if call["transposed"]:
            more = _each(call["output_padding"], len(kernel))
            return tuple(
                (s, d * (k - 1) + o + 1 - s - 2 * p, 1)
                for k, s, p, d, o in zip(kernel, stride, padding, dilation, more, strict=True)
            )
        return tuple(
            (1, 2 * p - d * (k - 1) - 1 + s, s) for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
        )
    if "_pool" in call.name and call.has("kernel_size") and call.has("stride"):
        count = len(call["kernel_size"])
        kernel = _each(call["kernel_size"], count)
        stride = _each(call["stride"] or kernel, count)
        padding = _each(call["padding"], count)
        dilation = _each(call["dilation"], count) if call.has("dilation") else (1,) * count
        ceil = bool(call["ceil_mode"])
        return tuple(
            (1, 2 * p - d * (k - 1) - 1 + s + (s - 1) * ceil, s)
            for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
        )
    return None


def _each(value: Any, count: int) -> tuple[int, ...]:
    items = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
    return items * count if len(items) == 1 else items
