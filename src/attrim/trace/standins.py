"""What stands in the place of a removed branch: tensors of zeros of the right shape, or nothing at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attrim.core.branches import Extent, Replacement
from attrim.core.cost import IntArray
from attrim.core.plan import within
from attrim.trace.graph import Graph, ModuleCall, Node
from attrim.trace.regions import Region

__all__ = ["StandIns", "ranges", "stand_ins", "transparent"]

_ANY = frozenset(("mul", "mm", "bmm", "matmul"))
"""Zero if one operand is."""

_ALL = frozenset(
    ("relu", "gelu", "silu", "tanh", "hardswish", "hardtanh", "relu6", "leaky_relu", "elu", "mish", "selu", "celu", "prelu",
     "_prelu_kernel", "neg", "abs", "square", "sin", "sqrt", "erf", "add", "sub", "cat", "stack", "mean", "sum", "div",
     "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "slice", "select",
     "split", "split_with_sizes", "chunk", "unbind", "roll", "flip", "avg_pool2d", "max_pool2d_with_indices",
     "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "upsample_nearest2d", "upsample_bilinear2d", "_to_copy",
     "narrow", "index_select", "unfold")
)  # fmt: skip
"""Zero if all activations among the operands are, and nothing else is added to them."""

_SAME = frozenset(
    ("relu", "gelu", "silu", "tanh", "hardswish", "hardtanh", "relu6", "leaky_relu", "elu", "mish", "neg", "abs")
)
"""Takes zeros of any shape to zeros of that shape."""


@dataclass(slots=True)
class StandIns:
    """How a region is removed.

    Attributes:
        replacements: module path -> what stands in its place.
        widths: module path -> labels of the channels that its zeros have.
        note: for people.
    """

    replacements: dict[str, Replacement]
    widths: dict[str, IntArray] = field(default_factory=dict)
    note: str = ""


def stand_ins(graph: Graph, region: Region, units: IntArray) -> StandIns | str:
    """Replacements for the modules of a region that make it return zeros, or why there are none."""
    if not region.modules:
        return "no module runs in one of its sides alone, so there is nothing that could be taken out"
    if graph.nodes[region.result].op >= 0 and not _replaceable(graph, region):
        return "a module of the branch returns more than one tensor, or none"
    made = _first_only(graph, region, units) or _one_by_one(graph, region, units)
    if made is None:
        return "the shape of a module's result cannot be told from its input"
    if _is_zero(graph, region, made):
        return made
    for path in reversed(region.modules):
        if made.replacements[path].kind == "identity":
            made.replacements[path] = Replacement("like")
            if _is_zero(graph, region, made):
                return made
    return "code between its last module and the sum makes something else than zero of zero"


def _replaceable(graph: Graph, region: Region) -> bool:
    """Whether each module call of the region returns one tensor, perhaps in a tuple, that is given a tensor."""
    for call in _calls(graph, region.modules):
        tensors = [n for n in call.returned if n is not None]
        if len(tensors) != 1 or not call.given or graph.nodes[call.given[0]].op >= call.first:
            return False
    return True


def _calls(graph: Graph, paths: Collection[str]) -> list[ModuleCall]:
    return sorted((c for c in graph.calls if c.path in paths), key=lambda c: (c.first, c.last))


# -- one stand-in for the whole branch ------------------------------------------------------------------------------


def _first_only(graph: Graph, region: Region, units: IntArray) -> StandIns | None:
    """The first module makes the zeros and the others pass them on, where what lies between takes zeros as they come."""
    calls = _calls(graph, region.modules)
    first, rest = calls[0], calls[1:]
    if any(c.path == first.path for c in rest) or not all(c.single and not c.is_tuple for c in calls):
        return None
    for number in region.ops:
        op = graph.ops[number]
        if within(op.path, region.modules):
            if not first.first <= number < first.last and any(_outside(graph, region, n) for n in op.reads):
                return None
        elif op.name not in _SAME or sum(graph.nodes[n].live for n in op.reads) != 1 or len(op.reads) > 1:
            return None
    if any(c.given[0] in region.entries for c in rest):
        return None
    extents = _extents(graph, first.given[0], region.result, units)
    if extents is None:
        return None
    found = StandIns({first.path: _zeros(extents[0])}, {})
    if extents[1] is not None:
        found.widths[first.path] = extents[1]
    found.replacements.update({c.path: Replacement() for c in rest})
    return found


def _outside(graph: Graph, region: Region, node: int) -> bool:
    return graph.nodes[node].live and graph.nodes[node].op not in region.ops


# -- a stand-in for each module ---------------------------------------------------------------------------------------


def _one_by_one(graph: Graph, region: Region, units: IntArray) -> StandIns | None:
    """Every module is replaced by one whose result has the same shape, so that any code between them runs as before."""
    found = StandIns({})
    for call in _calls(graph, region.modules):
        place, result = next((i, n) for i, n in enumerate(call.returned) if n is not None)
        extents = _extents(graph, call.given[0], result, units)
        if extents is None:
            return None
        new = _zeros(extents[0], (place, len(call.returned)) if call.is_tuple else None)
        fresh = any(_outside(graph, region, n) for n in call.given)  # in-place code behind it must not reach the input
        if new.kind == "like" and call.single and not call.is_tuple and not fresh:
            new = Replacement()
        path = call.path
        if found.replacements.setdefault(path, new) != new:
            return None
        if extents[1] is not None:
            found.widths[path] = extents[1]
    return found


def _zeros(extents: Sequence[Extent], returns: tuple[int, int] | None = None) -> Replacement:
    same = all(e.source == d and not e.steps for d, e in enumerate(extents))
    return Replacement("like", (), returns) if same else Replacement("zeros", tuple(extents), returns)


def _extents(graph: Graph, given: int, result: int, units: IntArray) -> tuple[list[Extent], IntArray | None] | None:
    """The shape of ``result`` as a function of the shape of ``given``; at most one width of its own."""
    source, target = graph.nodes[given], graph.nodes[result]
    steps = _spatial(graph, given, result)
    extents: list[Extent] = []
    widths: list[IntArray] = []
    for d, n in enumerate(target.shape):
        vector = target.axes[d]
        if vector is not None and units[vector].any():
            if _follows(source, d, vector, units):
                extents.append(Extent(d))
            else:
                extents.append(Extent(size=n, channels=True))
                widths.append(vector)
        elif steps is not None and d >= 2 and Extent(d, steps[d - 2]).at(source.shape[d]) == n:
            extents.append(Extent(d, _trimmed(steps[d - 2])))
        elif len(source.shape) == len(target.shape) and source.shape[d] == n and not _varies(source, d, units):
            extents.append(Extent(d))
        elif d == 0 or (steps is not None and d >= 2):
            return None
        else:
            extents.append(Extent(size=n))
    return (extents, widths[0] if widths else None) if len(widths) <= 1 else None


def _varies(source: Node, d: int, units: IntArray) -> bool:
    """Whether a cut may change the length of that dimension."""
    vector = source.axes[d]
    return vector is not None and bool(units[vector].any())


def _follows(source: Node, d: int, vector: IntArray, units: IntArray) -> bool:
    """Whether the same channels lie along that dimension of the input."""
    theirs = source.axes[d] if d < len(source.axes) else None
    return theirs is not None and len(theirs) == len(vector) and bool((units[theirs] == units[vector]).all())


def _trimmed(steps: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(s for s in steps if s != (1, 0, 1))


def _spatial(graph: Graph, given: int, result: int) -> list[tuple[tuple[int, int, int], ...]] | None:
    """What happens to each spatial length between two values, along one chain of operators; None if it cannot be told."""
    rank = len(graph.nodes[given].shape)
    if rank != len(graph.nodes[result].shape) or rank < 3:
        return None
    reach = _downstream(graph, given, result)
    windows = []
    node = result
    while node != given:
        op = graph.ops[graph.nodes[node].op]
        here = graph.nodes[node].shape
        options = [n for n in op.reads if n in reach and len(graph.nodes[n].shape) == rank]
        if not options:
            return None
        best = next((n for n in options if graph.nodes[n].shape[2:] == here[2:]), options[0])
        if op.window is not None and len(op.window) == rank - 2:
            windows.append(op.window)
        elif graph.nodes[best].shape[2:] != here[2:]:
            return None
        node = best
    return [tuple(w[d] for w in reversed(windows)) for d in range(rank - 2)]


def _downstream(graph: Graph, given: int, result: int) -> set[int]:
    """Values that depend on ``given`` and are made before ``result``, with both of them."""
    reach = {given}
    last = graph.nodes[result].op
    for number in range(max(graph.nodes[given].op, -1) + 1, last + 1):
        op = graph.ops[number]
        if any(n in reach for n in op.reads):
            reach.update(op.makes)
    return reach


def _is_zero(graph: Graph, region: Region, made: StandIns) -> bool:
    """Whether the region's result is zero once the replacements are in place."""
    zero: set[int] = set()
    ends: dict[int, list[ModuleCall]] = {}
    for call in _calls(graph, region.modules):
        ends.setdefault(call.last, []).append(call)
    for number in range(min(region.ops), region.total + 1):
        for call in ends.get(number, ()):
            result = next(n for n in call.returned if n is not None)
            passed = made.replacements[call.path].kind == "identity"
            if not passed or call.given[0] in zero:
                zero.add(result)
        if number in region.ops and not within(graph.ops[number].path, region.modules):
            op = graph.ops[number]
            if op.name in _ANY:
                held = any(n in zero for n in op.reads)
            else:
                held = op.name in _ALL and op.reads[0] in zero and _adds_nothing(graph, op.name, op.reads, zero)
            zero.update(op.makes if held else ())
    return region.result in zero


def _adds_nothing(graph: Graph, name: str, reads: Iterable[int], zero: Collection[int]) -> bool:
    """Whether all that is read is zero; what divides or bends does not matter."""
    if name in ("div", "prelu", "_prelu_kernel", "masked_fill", "index_select"):
        return True
    return all(n in zero for n in reads)


# -- nothing in its place ---------------------------------------------------------------------------------------------


def ranges(graph: Graph) -> dict[int, tuple[float, float]]:
    """Value -> the limits between which it lies, where operators alone tell; also with any branch set to zero."""
    known: dict[int, tuple[float, float]] = {}
    wide = (-float("inf"), float("inf"))
    for op in graph.ops:
        if op.bounds is not None:
            low, high = known.get(op.reads[0], wide)
            found = max(low, op.bounds[0]), max(min(high, op.bounds[1]), op.bounds[0])
        elif op.name in _KEEPS and op.reads:
            found = known.get(op.reads[0], wide)
        else:
            continue
        if found != wide and found[0] <= 0 <= found[1]:
            known.update(dict.fromkeys(op.makes, found))
    return known


_KEEPS = frozenset(("view", "_unsafe_view", "permute", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze",
                    "max_pool2d_with_indices", "max_pool1d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "mean",
                    "flip", "roll"))  # fmt: skip
"""Results lie between the same limits as the input, if those enclose zero."""


def transparent(
    graph: Graph, call: ModuleCall, regions: Iterable[Region], known: Mapping[int, tuple[float, float]]
) -> bool:
    """Whether a module returns its input as it is, once the branches ``regions`` are zero."""
    if not call.single or call.is_tuple or len(call.given) != 1:
        return False
    start = call.given[0]
    same = {start}
    wide = (-float("inf"), float("inf"))
    low, high = known.get(start, wide)
    sums = {region.total: region for region in regions}
    gone = frozenset().union(*(region.ops for region in sums.values()))
    for number in range(call.first, call.last):
        op = graph.ops[number]
        if number in gone or not (any(graph.nodes[n].readers for n in op.makes) or set(op.makes) & set(call.returned)):
            continue
        passes = number in sums and sums[number].other in same
        if op.bounds is not None and op.reads[0] in same:
            passes = passes or (low >= op.bounds[0] and high <= op.bounds[1])
        if not passes or _read_later(graph, op.makes, call):
            return False
        same.update(op.makes)
    idle = (c for c in graph.calls if c.first == c.last and not c.inert and same & set(c.given))
    if any(call.first < c.first < call.last or within(c.path, (call.path,)) for c in idle):
        return False  # dropout and the like do something in training
    return call.returned[0] in same


def _read_later(graph: Graph, makes: Iterable[int], call: ModuleCall) -> bool:
    return any(n not in call.returned and any(r >= call.last for r in graph.nodes[n].readers) for n in makes)
