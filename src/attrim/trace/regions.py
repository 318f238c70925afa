"""Where a network can lose one side of a sum: regions of operators whose only way out is one operand of that sum."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from attrim.core.channels import Reason
from attrim.trace.graph import Graph, Op

__all__ = ["Region", "find_regions", "reason_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A side of a sum that nothing else reads.

    Attributes:
        total: the sum, by operator number.
        result: the value that enters the sum.
        other: the value on the other side.
        ops: operators that only serve ``result``.
        entries: activations from outside that they read.
        modules: paths of the modules in which nothing else runs, outermost only, in order of their first call.
        straight: the other side is what the region starts from.
    """

    total: int
    result: int
    other: int
    ops: frozenset[int]
    entries: tuple[int, ...]
    modules: tuple[str, ...]
    straight: bool


def find_regions(
    graph: Graph, outputs: Collection[int], weights: Mapping[int, int]
) -> tuple[list[Region], list[tuple[int, str]]]:
    """Every sum's droppable side, and for each other sum of two activations why it has none.

    Args:
        graph: the recorded run.
        outputs: values that the network returns.
        weights: operator -> its MACs, for those that count. Where both sides could go, the one with more counted
            operators, then with more MACs, is the branch and the other the shortcut.
    """
    dead = _dead(graph, outputs)
    before = _ancestors(graph)
    every = _by_path(graph.ops, range(len(graph.ops)), dead)
    found: list[Region] = []
    refused: list[tuple[int, str]] = []
    for number, op in enumerate(graph.ops):
        if not op.operands or op.operands[0] == op.operands[1]:
            continue
        reasons: list[str] = []
        sides = []
        for result, other in _sides(op):
            ops = _serving(graph, number, result, outputs, dead)
            why = _useless(graph, ops, other, before)
            if why:
                reasons.append(why)
            else:
                sides.append((result, other, ops))
        if not sides:
            refused.append((number, _best(reasons)))
            continue
        result, other, ops = max(sides, key=lambda side: _weight(side[2], weights))
        entries = _entries(graph, ops)
        modules = _vanishing(graph, ops, every, dead)
        found.append(Region(number, result, other, ops, entries, modules, other in entries))
    return found, refused


def _sides(op: Op) -> list[tuple[int, int]]:
    """(branch, shortcut) as operands allow: what is left of the sum must be the shortcut as it is."""
    first, second = op.operands
    return [(second, first), (first, second)] if op.name == "add" and op.plain else [(second, first)]


def _dead(graph: Graph, outputs: Collection[int]) -> set[int]:
    """Operators whose results nobody reads, such as the saved statistics of a norm in eval mode."""
    dead: set[int] = set()
    for number in range(len(graph.ops) - 1, -1, -1):
        makes = graph.ops[number].makes
        unread = all(n not in outputs and all(r in dead for r in graph.nodes[n].readers) for n in makes)
        if unread:
            dead.add(number)
    return dead


def _ancestors(graph: Graph) -> list[int]:
    """Per operator a bit mask of the values that its results depend on."""
    masks: list[int] = []
    for op in graph.ops:
        mask = 0
        for read in op.reads:
            mask |= 1 << read
            if graph.nodes[read].op >= 0:
                mask |= masks[graph.nodes[read].op]
        masks.append(mask)
    return masks


def _serving(graph: Graph, total: int, result: int, outputs: Collection[int], dead: Collection[int]) -> frozenset[int]:
    """Operators all of whose results end up in ``result`` and nowhere else. Later operators are decided first."""
    ops: set[int] = set()
    queue = [-graph.nodes[result].op]
    seen = set(queue)
    while queue:
        number = -heapq.heappop(queue)
        if number < 0 or not all(
            node not in outputs
            and all(r in ops or r in dead or (r == total and node == result) for r in graph.nodes[node].readers)
            for node in graph.ops[number].makes
        ):
            continue
        ops.add(number)
        for read in graph.ops[number].reads:
            key = -graph.nodes[read].op
            if key not in seen and key <= 0:
                seen.add(key)
                heapq.heappush(queue, key)
    return frozenset(ops)


def _entries(graph: Graph, ops: Collection[int]) -> tuple[int, ...]:
    reads = (read for number in sorted(ops) for read in graph.ops[number].reads)
    return tuple(dict.fromkeys(n for n in reads if graph.nodes[n].live and graph.nodes[n].op not in ops))


def _useless(graph: Graph, ops: Collection[int], other: int, before: Sequence[int]) -> str:
    """Why these operators are no branch, or ""."""
    if not ops:
        return "both sides of the sum are read elsewhere too"
    entries = _entries(graph, ops)
    made_by = graph.nodes[other].op
    reach = (1 << other) | (before[made_by] if made_by >= 0 else 0)
    if not any(reach >> entry & 1 for entry in entries):
        return "its sides start from different tensors"
    if not any(graph.nodes[read].op < 0 and not graph.nodes[read].live for n in ops for read in graph.ops[n].reads):
        return "no parameter lies on one of its sides alone"
    return ""


def _best(reasons: Sequence[str]) -> str:
    """The reason of the side that came closest."""
    order = ("no parameter lies", "its sides start", "both sides")
    return min(reasons, key=lambda text: next(i for i, start in enumerate(order) if text.startswith(start)))


def _weight(ops: Collection[int], weights: Mapping[int, int]) -> tuple[int, int, int]:
    counted = [weights[n] for n in ops if n in weights]
    return len(counted), sum(counted), len(ops)


def _by_path(ops: Sequence[Op], numbers: Collection[int], dead: Collection[int]) -> Counter[str]:
    """Module path -> operators that ran in it or below it."""
    direct = Counter(ops[n].path for n in numbers if n not in dead)
    counts: Counter[str] = Counter()
    for path, count in direct.items():
        for outer in _outwards(path):
            counts[outer] += count
    return counts


def _outwards(path: str) -> list[str]:
    """The path and those of all enclosing modules, the model itself last."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] + ([""] if path else [])


def _vanishing(graph: Graph, ops: Collection[int], every: Mapping[str, int], dead: Collection[int]) -> tuple[str, ...]:
    """Outermost modules that were called and in which nothing but ``ops`` ran."""
    inside = _by_path(graph.ops, ops, dead)
    called = dict.fromkeys(call.path for call in sorted(graph.calls, key=lambda c: (c.first, -c.last)))
    whole = [path for path in called if path and inside[path] and inside[path] == every[path]]
    chosen = set(whole)
    return tuple(path for path in whole if not any(outer in chosen for outer in _outwards(path)[1:]))


def reason_of(graph: Graph, number: int, text: str) -> Reason:
    """A reason that points at an operator."""
    op = graph.ops[number]
    return Reason(text, f"aten.{op.name}", op.path, op.line)
