"""Residual branches of a recorded run: what can be removed whole, what goes with it, and why other sums hold none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from attrim.core.branches import Branch, Replacement
from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.trace.graph import Graph, ModuleCall
from attrim.trace.regions import Region, find_regions, reason_of
from attrim.trace.standins import StandIns, ranges, stand_ins, transparent
from attrim.trace.trial import tried

if TYPE_CHECKING:
    from attrim.trace.capture import Analysis

__all__ = ["Found", "find_branches"]

_LINEAR = frozenset(("mul", "div", "neg", "view", "_unsafe_view", "reshape", "permute", "transpose", "unsqueeze", "squeeze",
                     "_to_copy", "slice"))  # fmt: skip
"""Takes g times its input to g times its result, if only one of its inputs is an activation."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A branch before its channels are known.

    Attributes:
        branch: without groups and widths.
        region: its operators.
        removed: the modules that are replaced; all that lies in them goes.
        widths: module path -> labels of the channels of the zeros in its place.
    """

    branch: Branch
    region: Region
    removed: frozenset[str]
    widths: Mapping[str, IntArray]


def find_branches(analysis: Analysis) -> tuple[list[Found], dict[str, tuple[str, ...]], list[Reason]]:
    """The branches in network order, the blocks that become an identity once several branches are gone, and the sums
    that hold no branch with the reasons."""
    graph = analysis.tracer.graph
    if graph is None:
        return [], {}, []
    outputs = {n for out in analysis.outputs for n in graph.values(out)}
    weights: Counter[int] = Counter()
    for term in analysis.book.costs:
        weights[term.op] += term.coefficient * int(np.prod([len(f) for f in term.factors], dtype=np.int64))
    regions, refused = find_regions(graph, outputs, weights)
    reasons = [reason_of(graph, number, f"not a branch: {text}") for number, text in refused]
    known = ranges(graph)
    removals: dict[int, StandIns] = {}
    below = _below(analysis)
    for region in regions:
        made = _removal(graph, region, regions, known, analysis.solution.units)
        if not isinstance(made, str):
            made = _refusal(analysis, graph, region, made, below) or made
        if isinstance(made, str):
            reasons.append(reason_of(graph, region.total, f"cannot be removed: {made}"))
        else:
            removals[region.total] = made
    reasons += _try(analysis, graph, regions, removals)
    kept = [region for region in regions if region.total in removals]
    found = _name(graph, [_branch(graph, region, removals[region.total], below) for region in kept])
    passes = _passes(graph, found, known, below)
    failed = tried(analysis, [{path: Replacement()} for path in passes])
    passes = {path: ids for i, (path, ids) in enumerate(passes.items()) if i not in failed}
    return found, passes, list(dict.fromkeys(reasons))


def _try(analysis: Analysis, graph: Graph, regions: Sequence[Region], removals: dict[int, StandIns]) -> list[Reason]:
    """Take out of ``removals`` what the network does not run without: the outermost branches in one run, the innermost in
    another. What lies between them is left to the proof of a plan."""
    there = [region for region in regions if region.total in removals]
    outer = [r.total for r in there if not any(r.total in other.ops for other in there)]
    inner = [r.total for r in there if r.total not in outer and not any(other.total in r.ops for other in there)]
    reasons = []
    for totals in (outer, inner):
        for i, why in tried(analysis, [removals[total].replacements for total in totals]).items():
            reasons.append(reason_of(graph, totals[i], f"cannot be removed: {why}"))
            del removals[totals[i]]
    return reasons


# -- removal ------------------------------------------------------------------------------------------------------------


def _removal(
    graph: Graph, region: Region, regions: Sequence[Region], known: Mapping[int, tuple[float, float]], units: IntArray
) -> StandIns | str:
    """The whole block becomes an identity where it returns its input, else its modules make zeros."""
    for call in _blocks(graph, region):
        if transparent(graph, call, [region], known):
            return StandIns({call.path: Replacement()}, {}, "the block returns its input")
    return stand_ins(graph, region, units)


def _blocks(graph: Graph, region: Region) -> list[ModuleCall]:
    """Calls of the modules around a sum, the innermost first; only those that are called once."""
    times = Counter(call.path for call in graph.calls)
    around = [
        call
        for call in graph.calls
        if call.path and times[call.path] == 1 and call.first <= min(region.ops) and region.total < call.last
    ]
    return sorted(around, key=lambda call: call.last - call.first)[:2]


def _below(analysis: Analysis) -> dict[str, list[str]]:
    """Module path -> names of the tensors in it, tied ones under every name they have."""
    names: dict[str, list[str]] = {}
    for name in (*analysis.engine.named.tensors, *analysis.engine.named.aliases):
        parts = name.split(".")
        for n in range(1, len(parts)):
            names.setdefault(".".join(parts[:n]), []).append(name)
    return names


def _refusal(
    analysis: Analysis, graph: Graph, region: Region, made: StandIns, below: Mapping[str, Sequence[str]]
) -> str:
    """Why these modules cannot go: a tensor of theirs is needed elsewhere. Or ""."""
    aliases = analysis.engine.named.aliases
    going = {name for path in made.replacements for name in below.get(path, ())}
    for other, first in aliases.items():
        if (other in going) != (first in going):
            return f"'{first}' is shared with a module outside of it"
    for name in going - set(aliases):
        readers = graph.nodes[graph.tensors[name]].readers
        if any(r not in region.ops and _lives(graph, r) for r in readers):
            return f"'{name}' is also used outside of it"
    return ""


def _lives(graph: Graph, number: int) -> bool:
    return any(graph.nodes[n].readers for n in graph.ops[number].makes)


# -- the noun -------------------------------------------------------------------------------------------------------------


def _branch(graph: Graph, region: Region, made: StandIns, below: Mapping[str, Sequence[str]]) -> Found:
    op = graph.ops[region.total]
    removed = frozenset(made.replacements)
    branch = Branch(
        id="",
        block=_common([op.path, *(path.rpartition(".")[0] for path in region.modules)]),
        modules=tuple(made.replacements) if made.note else region.modules,
        shortcut="identity" if region.straight else "computed",
        gate=_gate(graph, region),
        tensors=tuple(name for path in made.replacements for name in below.get(path, ()) if name in graph.tensors),
        replacements=made.replacements,
        note=made.note or "its modules return zeros",
        source=op.line,
    )
    return Found(branch, region, removed, made.widths)


def _common(paths: Sequence[str]) -> str:
    """The innermost module that contains all of these."""
    parts = [path.split(".") if path else [] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _gate(graph: Graph, region: Region) -> str:
    """The outermost module whose result is the branch's, up to a factor that does not depend on the input."""
    times = Counter(call.path for call in graph.calls)
    node = region.result
    while graph.nodes[node].op in region.ops:
        ends = [
            call
            for call in graph.calls
            if call.path and times[call.path] == 1 and not call.is_tuple and call.returned == (node,)
            and all(n in region.ops for n in range(call.first, call.last) if _lives(graph, n))
        ]  # fmt: skip
        if ends:
            return max(ends, key=lambda call: call.last - call.first).path or ""
        op = graph.ops[graph.nodes[node].op]
        live = [n for n in op.reads if graph.nodes[n].live]
        scaled = op.name in _LINEAR and len(live) == 1 and (op.name == "mul" or live[0] == op.reads[0])
        if not scaled or len(graph.nodes[live[0]].readers) != 1:
            return ""
        node = live[0]
    return ""


def _name(graph: Graph, found: Sequence[Found]) -> list[Found]:
    """Give every branch its id, and the id of the branch that contains it."""
    blocks = Counter(f.branch.block for f in found)
    ids: list[str] = []
    for f in found:
        alone = f.branch.block and blocks[f.branch.block] == 1
        inner = {path for g in found if g.region.total in f.region.ops for path in g.branch.modules}
        name = f.branch.block if alone else _heaviest(graph, f, inner)
        count = sum(i == name or i.startswith(f"{name}#") for i in ids)
        ids.append(f"{name}#{count + 1}" if count else name)
    named = []
    for f, name in zip(found, ids, strict=True):
        outer = [(len(g.region.ops), i) for g, i in zip(found, ids, strict=True) if f.region.total in g.region.ops]
        named.append(replace(f, branch=replace(f.branch, id=name, inside=min(outer)[1] if outer else "")))
    return named


def _heaviest(graph: Graph, found: Found, inner: Collection[str]) -> str:
    """The removed module with the most weights, the last of equals; one of its own, if there is any."""
    own = [path for path in found.branch.modules if path not in inner]
    weights = dict.fromkeys(reversed(own or found.branch.modules), 0)
    for name in found.branch.tensors:
        path = next((p for p in weights if name.startswith(f"{p}.")), None)
        if path is not None:
            weights[path] += math.prod(graph.nodes[graph.tensors[name]].shape)
    return max(weights, key=lambda path: weights[path])


def _passes(
    graph: Graph,
    found: Sequence[Found],
    known: Mapping[int, tuple[float, float]],
    below: Mapping[str, Sequence[str]],
) -> dict[str, tuple[str, ...]]:
    """Blocks of several branches that become an identity once all of them are gone, if nothing else stays behind."""
    passes: dict[str, tuple[str, ...]] = {}
    tried: set[str] = set()
    for f in found:
        for call in _blocks(graph, f.region)[:1]:
            path = call.path
            if path in tried:
                continue
            tried.add(path)
            top = [
                g for g in found
                if call.first <= g.region.total < call.last and not any(
                    g.region.total in h.region.ops and call.first <= h.region.total < call.last for h in found)
            ]  # fmt: skip
            if len(top) < 2:
                continue
            going = {name for g in top for name in g.branch.tensors}
            if any(name in graph.tensors and name not in going for name in below.get(path, ())):
                continue
            if transparent(graph, call, [g.region for g in top], known):
                passes[path] = tuple(g.branch.id for g in top)
    return passes
