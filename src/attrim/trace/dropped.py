"""The proof for removed branches: the network without them against the original with their outputs zeroed at the sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.channels import Reason
from attrim.core.plan import PruningPlan, within
from attrim.modules.names import fingerprint, named_tensors
from attrim.modules.skips import without_modules
from attrim.trace.branches import Found, find_branches
from attrim.trace.call import Call
from attrim.trace.capture import Analysis
from attrim.trace.compare import relative
from attrim.trace.graph import Graph
from attrim.trace.labels import Conflict, Recorder
from attrim.trace.run import Engine, Run
from attrim.trace.tracer import Tracer

__all__ = ["Dropped", "compare_dropped", "cuts_alone", "dropped_by"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a plan drops.

    Attributes:
        found: the branches.
        conflicts: removed modules that no branch accounts for.
    """

    found: tuple[Found, ...]
    conflicts: tuple[Conflict, ...]


def dropped_by(analysis: Analysis, plan: PruningPlan) -> Dropped:
    """The branches that the removed modules amount to, and the removed modules that are no part of any."""
    found, _, sums = find_branches(analysis)
    gone = tuple(f for f in found if all(within(path, plan.drops) for path in _parts(f, plan.drops)))
    known = {path for f in gone for path in (*f.removed, *f.region.modules)}
    stray = [d for d in plan.drops if not any(within(path, (d,)) or within(d, (path,)) for path in known)]
    return Dropped(gone, tuple(_stray(path, found, sums) for path in stray))


def _parts(found: Found, drops: Collection[str]) -> Collection[str]:
    """The modules that must be gone for a branch to be: the block that is an identity without it, or its own."""
    return found.removed if all(within(path, drops) for path in found.removed) else found.region.modules


def _stray(path: str, found: Sequence[Found], sums: Sequence[Reason]) -> Conflict:
    partly = [f.branch.id for f in found if any(within(path, (m,)) or within(m, (path,)) for m in f.region.modules)]
    near = [r for r in sums if within(r.module, (path,)) or within(path, (r.module,) if r.module else ())]
    text = f"the plan removes the module '{path}', which is not a whole residual branch"
    if partly:
        text += f"; it is part of the branch '{partly[0]}'"
    elif near:
        text += f"; the sum near it: {near[0]}"
    return Conflict(Reason(text))


def cuts_alone(model: nn.Module, plan: PruningPlan) -> tuple[nn.Module, PruningPlan]:
    """The model without the removed modules, and what the plan still has to cut from it."""
    base = without_modules(model, plan.drops, plan.replacements)
    rest = PruningPlan(fingerprint(named_tensors(base).shapes), plan.cuts, attributes=plan.attributes)
    return base, rest


def compare_dropped(
    analysis: Analysis, base: nn.Module, gone: Sequence[Found], dtype: torch.dtype | None
) -> float | Reason:
    """Largest relative difference between the original with zeroed branches and ``base``, or why one does not run.

    Compared are all outputs and the averages of the leaf modules that lie in no removed branch.
    """
    runs = []
    for model, mask in ((analysis.engine.model, _zeroing(analysis, gone)), (base, None)):
        engine = Engine(model, analysis.engine.example)
        engine.real, engine.dtype, engine.sums = True, dtype, True
        blank: Mapping[str, Any] = {name: [None] * t.ndim for name, t in engine.named.tensors.items()}
        runs.append(engine.run(Recorder(), blank, {}, mask=mask))
    for run in runs:
        if run.failure is not None:
            return run.failure.reason
    zeroed, small = runs
    if len(zeroed.outputs) != len(small.outputs):
        return Reason(
            f"the original returns {len(zeroed.outputs)} tensors, the network without them {len(small.outputs)}"
        )
    pairs = [*zip(zeroed.outputs, small.outputs, strict=True), *_averages(analysis, gone, zeroed, small)]
    return max((_gap(a, b) for a, b in pairs), default=0.0)


def _averages(analysis: Analysis, gone: Sequence[Found], zeroed: Run, small: Run) -> list[tuple[Tensor, Tensor]]:
    """Averages of the leaf modules that run in both networks equally often and outside of the branches."""
    graph = _graph(analysis)
    ops = frozenset().union(*(f.region.ops for f in gone))
    inside = {c.path for c in graph.calls if any(n is not None and graph.nodes[n].op in ops for n in c.returned)}
    tables: list[dict[str, list[Tensor]]] = []
    for run in (zeroed, small):
        table: dict[str, list[Tensor]] = {}
        for (path, _, _), total in zip(run.tracer.taps, run.tracer.sums or [], strict=True):
            table.setdefault(path, []).append(total)
        tables.append(table)
    both = [p for p in tables[0] if p not in inside and len(tables[0][p]) == len(tables[1].get(p, ()))]
    return [pair for path in both for pair in zip(tables[0][path], tables[1][path], strict=True)]


def _gap(a: Tensor, b: Tensor) -> float:
    if a.is_floating_point() or a.shape != b.shape:
        return relative(a, b)
    return 0.0 if torch.equal(a, b) else float("inf")


def _graph(analysis: Analysis) -> Graph:
    return analysis.tracer.graph or Graph()


def _zeroing(analysis: Analysis, gone: Sequence[Found]) -> Callable[[Call, Tracer], tuple[Any, Any]]:
    """Zero the branch's operand of each sum. Sums are told by module, line and order, which every run shares."""
    graph = _graph(analysis)
    wanted: dict[tuple[str, str, str, int], int] = {}
    totals = {f.region.total: f.region for f in gone}
    counts: Counter[tuple[str, str, str]] = Counter()
    for number, op in enumerate(graph.ops):
        if op.name in _SUMS:
            key = (op.name, op.path, op.line)
            if number in totals:
                wanted[(*key, counts[key])] = op.operands.index(totals[number].result)
            counts[key] += 1
    seen: Counter[tuple[str, str, str]] = Counter()

    def mask(call: Call, t: Tracer) -> tuple[Any, Any]:
        if call.name not in _SUMS:
            return call.args, call.kwargs
        key = (call.name, t.path, str(t.lines))
        place = wanted.get((*key, seen[key]))
        seen[key] += 1
        if place is None:
            return call.args, call.kwargs
        if place == 0 and call.func._schema.is_mutable:
            call.args[0].zero_()  # the sum is written into the branch's own result, which nobody else reads
            return call.args, call.kwargs
        args = list(call.args)
        args[place] = torch.zeros_like(args[place])
        return args, call.kwargs

    return mask


_SUMS = ("add", "sub")
