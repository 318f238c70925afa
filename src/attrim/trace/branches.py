"""Residual branches of a recorded run: what can be removed whole, what goes with it, and why other sums hold none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from attrim.core.branches import Branch, Replacement
from attrim.core.channels import ChannelGroup, Reason
from attrim.core.cost import IntArray
from attrim.core.plan import within
from attrim.trace.graph import Graph, ModuleCall
from attrim.trace.regions import Region, find_regions, reason_of
from attrim.trace.standins import StandIns, ranges, stand_ins, transparent
from attrim.trace.trial import tried

if TYPE_CHECKING:
    from attrim.trace.capture import Analysis

__all__ = ["Found", "Owners", "find_branches", "group_owner", "owners"]

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


@dataclass(slots=True)
class Owners:
    """What belongs to which branch, the smallest one that takes it along; -1 or missing: to none.

    Attributes:
        ids: the branches.
        inside: branch -> the smallest that contains it.
        ops: operator -> branch.
        tensors: tensor name -> branch.
    """

    ids: tuple[str, ...] = ()
    inside: tuple[int, ...] = ()
    ops: dict[int, int] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)


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
    shared = _shared(analysis)
    for region in regions:
        made = _removal(graph, region, regions, known, analysis.solution.units)
        if not isinstance(made, str):
            made = _refusal(analysis, graph, region, made, shared) or made
        if isinstance(made, str):
            reasons.append(reason_of(graph, region.total, f"cannot be removed: {made}"))
        else:
            removals[region.total] = made
    reasons += _try(analysis, graph, regions, removals)
    kept = [region for region in regions if region.total in removals]
    found = _name([_branch(analysis, graph, region, removals[region.total]) for region in kept])
    passes = _passes(analysis, graph, found, known)
    failed = tried(analysis, [{path: Replacement()} for path in passes])
    passes = {path: ids for i, (path, ids) in enumerate(passes.items()) if i not in failed}
    return found, passes, list(dict.fromkeys(reasons))


def _try(analysis: Analysis, graph: Graph, regions: Sequence[Region], removals: dict[int, StandIns]) -> list[Reason]:
    """Take out of ``removals`` what the network does not run without; branches inside others in runs of their own."""
    depth = {
        r.total: sum(r.total in outer.ops for outer in regions if outer.total in removals)
        for r in regions if r.total in removals
    }  # fmt: skip
    reasons = []
    for level in sorted(set(depth.values())):
        totals = [total for total in removals if depth[total] == level]
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


def _shared(analysis: Analysis) -> dict[str, list[str]]:
    """First name of a tied tensor -> its other names."""
    names: dict[str, list[str]] = {}
    for other, first in analysis.engine.named.aliases.items():
        names.setdefault(first, []).append(other)
    return names


def _refusal(
    analysis: Analysis, graph: Graph, region: Region, made: StandIns, shared: Mapping[str, Sequence[str]]
) -> str:
    """Why these modules cannot go: a tensor of theirs is needed elsewhere. Or ""."""
    removed = made.replacements
    for name, node in graph.tensors.items():
        names = [name, *shared.get(name, ())]
        if not any(within(n, removed) for n in names):
            continue
        if not all(within(n, removed) for n in names):
            return f"'{name}' is shared with a module outside of it"
        readers = graph.nodes[node].readers
        if any(r not in region.ops and _lives(graph, r) for r in readers):
            return f"'{name}' is also used outside of it"
    return ""


def _lives(graph: Graph, number: int) -> bool:
    return any(graph.nodes[n].readers for n in graph.ops[number].makes)


# -- the noun -------------------------------------------------------------------------------------------------------------


def _branch(analysis: Analysis, graph: Graph, region: Region, made: StandIns) -> Found:
    op = graph.ops[region.total]
    removed = frozenset(made.replacements)
    branch = Branch(
        id="",
        block=_common([op.path, *(path.rpartition(".")[0] for path in region.modules)]),
        modules=tuple(made.replacements) if made.note else region.modules,
        shortcut="identity" if region.straight else "computed",
        gate=_gate(graph, region),
        tensors=tuple(name for name in analysis.engine.named.tensors if within(name, removed)),
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
        if op.name not in _LINEAR or len(live) != 1 or live[0] != op.reads[0] or len(graph.nodes[live[0]].readers) != 1:
            return ""
        node = live[0]
    return ""


def _name(found: Sequence[Found]) -> list[Found]:
    """Give every branch its id, and the id of the branch that contains it."""
    blocks = Counter(f.branch.block for f in found)
    ids: list[str] = []
    for f in found:
        alone = f.branch.block and blocks[f.branch.block] == 1
        name = f.branch.block if alone else _heaviest(f.branch)
        count = sum(i == name or i.startswith(f"{name}#") for i in ids)
        ids.append(f"{name}#{count + 1}" if count else name)
    named = []
    for f, name in zip(found, ids, strict=True):
        outer = [(len(g.region.ops), i) for g, i in zip(found, ids, strict=True) if f.region.total in g.region.ops]
        named.append(replace(f, branch=replace(f.branch, id=name, inside=min(outer)[1] if outer else "")))
    return named


def _heaviest(branch: Branch) -> str:
    counts = {path: sum(name.startswith(f"{path}.") for name in branch.tensors) for path in branch.modules}
    return max(counts, key=lambda path: counts[path])


def _passes(
    analysis: Analysis, graph: Graph, found: Sequence[Found], known: Mapping[int, tuple[float, float]]
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
            left = [n for n in analysis.engine.named.tensors if within(n, (path,))]
            if len(top) < 2 or not all(any(within(n, g.removed) for g in top) for n in left):
                continue
            if transparent(graph, call, [g.region for g in top], known):
                passes[path] = tuple(g.branch.id for g in top)
    return passes


# -- what belongs to which ------------------------------------------------------------------------------------------------


def owners(graph: Graph | None, found: Sequence[Found]) -> Owners:
    """Which operators and tensors go with which branch."""
    ids = tuple(f.branch.id for f in found)
    known = Owners(ids, tuple(ids.index(f.branch.inside) if f.branch.inside else -1 for f in found))
    by_size = sorted(range(len(found)), key=lambda i: -len(found[i].region.ops))  # the smallest has the last word
    for i in by_size:
        known.tensors.update(dict.fromkeys(found[i].branch.tensors, i))
        if graph is not None:
            ops = (n for n in found[i].region.ops if within(graph.ops[n].path, found[i].removed))
            known.ops.update(dict.fromkeys(ops, i))
    return known


def group_owner(group: ChannelGroup, known: Owners) -> int:
    """The smallest branch with which a group vanishes wholly, or -1."""
    chains = [_chain(known.tensors.get(member.axis.tensor, -1), known) for member in group.members]
    return next((i for i in chains[0] if all(i in chain for chain in chains)), -1)


def _chain(branch: int, known: Owners) -> list[int]:
    """A branch and those that contain it, outwards."""
    chain = []
    while branch >= 0:
        chain.append(branch)
        branch = known.inside[branch]
    return chain
