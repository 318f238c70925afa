"""The proof: a pruned network, run with its survivors' labels and run in numbers, against the masked original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.core.plan import PruningPlan, within
from attrim.errors import InputError, PlanError
from attrim.modules.names import fingerprint, named_tensors
from attrim.modules.select import check_selects
from attrim.trace.capture import Analysis, analyse
from attrim.trace.compare import TOLERANCE, compare, exact_part
from attrim.trace.dropped import compare_dropped, cuts_alone, dropped_by
from attrim.trace.inputs import Example, example_of
from attrim.trace.labels import Conflict
from attrim.trace.probe import Alive, Watcher
from attrim.trace.run import Engine
from attrim.trace.selected import compare_alike, widened

__all__ = ["Verification", "verify"]

_SHOWN = 8
"""Conflicts that are listed at most."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was proved about a pruned network.

    Attributes:
        ok: no conflict, and the part of the cut that should be exact is.
        exact: nothing that was cut is marked inexact.
        max_error: largest difference between the pruned network and the masked original, relative to the largest value,
            over all outputs and over the channel averages of every leaf module. For an inexact cut it is information, not
            a verdict.
        exact_error: the same for the exactly removable channels alone, which is always judged.
        conflicts: places where the pruned network combines positions that do not belong together.
        effects: causes of inexactness -> groups that were cut in spite of it.
        dtype: precision of the comparison; ``float64`` unless the network cannot run in it.
    """

    ok: bool
    exact: bool
    max_error: float
    exact_error: float
    conflicts: tuple[Conflict, ...]
    effects: Mapping[str, tuple[str, ...]]
    dtype: str

    def __str__(self) -> str:
        if self.conflicts:
            return "not ok: " + "; ".join(str(c) for c in self.conflicts[:3])
        if self.exact:
            return f"{'ok' if self.ok else 'not ok'}, exact: max error {self.max_error:.2e} in {self.dtype}"
        causes = "; ".join(f"{cause} ({len(groups)} groups)" for cause, groups in self.effects.items())
        return (
            f"{'ok' if self.ok else 'not ok'}: inexact by {causes}; the exact part differs by {self.exact_error:.2e} "
            f"in {self.dtype}"
        )


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    tolerance: float = TOLERANCE,
    analysis: Analysis | None = None,
) -> Verification:
    """Prove that ``small`` computes what ``model`` computes with the removed positions zeroed at every consumer.

    Selected inputs first: layers that read a part of a stream equal layers that read all of it with zeros in their weights.
    Then dropped branches: the network without them must equal the original with their outputs zeroed at the sums. Then,
    for the cuts, two independent checks. (1) ``small`` is traced again with every surviving position carrying the original's channel;
    any operator that combines different channels is a conflict. (2) Both networks run in float64 on the example inputs;
    the original has removed positions set to zero wherever they are summed over. Call it before any recovery changes
    weights.

    Args:
        model: the original. Never changed.
        small: ``attrim.apply(model, plan)``.
        plan: the plan.
        example_inputs: as for :func:`attrim.trace`.
        tolerance: largest relative difference that counts as equal (float64).
        analysis: the trace of ``model`` if it is at hand, to save a run.

    Raises:
        PlanError: the plan was not made for ``model``, or ``small`` does not have the shapes that it leaves.

    Example:
        >>> check = attrim.verify(model, small, plan, torch.randn(1, 3, 224, 224))
        >>> check.ok, check.exact, check.max_error
        (True, True, 3.1e-15)
    """
    if not isinstance(small, nn.Module):
        raise InputError(f"small: expected the pruned nn.Module, found {type(small).__name__}.")
    _check_shapes(model, small, plan)
    analysis = analysis or analyse(model, example_inputs)
    if plan.selects:
        return _verify_selects(model, small, plan, example_inputs, tolerance, analysis)
    if plan.drops:
        return _verify_drops(model, small, plan, example_inputs, tolerance, analysis)
    return _verify_cuts(model, small, plan, example_inputs, tolerance, analysis)


def _verify_selects(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, tolerance: float, analysis: Analysis
) -> Verification:
    """First the selections, then everything else between the two networks without them."""
    check_selects(model, plan)
    wide = widened(model, small, plan, analysis)
    if wide.conflicts:
        return Verification(False, True, float("inf"), float("inf"), wide.conflicts, {}, "float64")
    error, dtype = compare_alike(wide.small, small, example_of(example_inputs))
    known = analyse(wide.model, example_inputs, decisions=analysis.tracer.decisions)
    rest = verify(wide.model, wide.small, wide.plan, example_inputs, tolerance=tolerance, analysis=known)
    return replace(
        rest,
        ok=rest.ok and error <= (tolerance if dtype == "float64" else max(tolerance, 1e-3)),
        max_error=max(rest.max_error, error),
        exact_error=max(rest.exact_error, error),
        dtype=rest.dtype if dtype == "float64" else dtype,
    )


def _verify_drops(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, tolerance: float, analysis: Analysis
) -> Verification:
    """First the network without the branches against the original with zeroed branches, then its cuts."""
    out = dropped_by(analysis, plan)
    if out.conflicts:
        return Verification(False, True, float("inf"), float("inf"), out.conflicts, {}, "float64")
    base, rest = cuts_alone(model, plan)
    dtype, error = "float64", compare_dropped(analysis, base, out.found, torch.float64)
    if isinstance(error, Reason):
        dtype, error = "the model's own precision", compare_dropped(analysis, base, out.found, None)
    if isinstance(error, Reason):
        conflict = Conflict(
            Reason(f"without the dropped branches: {error.text}", error.operator, error.module, error.source)
        )
        return Verification(False, True, float("inf"), float("inf"), (conflict,), {}, dtype)
    limit = tolerance if dtype == "float64" else max(tolerance, 1e-3)
    cut = _verify_cuts(
        base, small, rest, example_inputs, tolerance, analyse(base, example_inputs, decisions=analysis.tracer.decisions)
    )
    return replace(
        cut,
        ok=cut.ok and error <= limit,
        max_error=max(cut.max_error, error),
        exact_error=max(cut.exact_error, error),
        dtype=cut.dtype if dtype == "float64" else dtype,
    )


def _verify_cuts(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, tolerance: float, analysis: Analysis
) -> Verification:
    """The cuts of a plan without drops."""
    alive = _alive(analysis, plan)
    mixed, departure = _coherence(analysis, small, alive, example_of(example_inputs))
    conflicts = [*_torn(analysis, alive), *mixed]
    effects = _effects(analysis, alive)
    if departure is not None and (effects or conflicts):  # where numbers are no judge, the course of the network is
        conflicts.append(departure)
    if conflicts:
        return Verification(False, not effects, float("inf"), float("inf"), tuple(conflicts), effects, "float64")
    error, dtype, failure = compare(analysis, small, alive)
    exact_error = error
    if effects:
        exact_error, dtype, failure = compare(analysis, None, exact_part(analysis, alive))
    limit = tolerance if dtype == "float64" else max(tolerance, 1e-3)
    foreign = _foreign(model, small, plan)
    ok = exact_error <= limit and not foreign
    if failure is not None:
        foreign.insert(0, Conflict(failure))
    if departure is not None and exact_error > limit:
        foreign.insert(0, departure)
    return Verification(ok, not effects, error, exact_error, tuple(foreign), effects, dtype)


def _check_shapes(model: nn.Module, small: nn.Module, plan: PruningPlan) -> None:
    before, after = named_tensors(model).shapes, named_tensors(small).shapes
    if plan.fingerprint != fingerprint(before):
        raise PlanError(
            "the plan was not made for this model (the fingerprints differ). Pass the model that was traced."
        )
    left = {name: shape for name, shape in before.items() if not within(name, plan.drops)}
    left |= {f"{path}.zeros": (r.width,) for path, r in plan.replacements.items() if r.width is not None}
    left |= {f"{path}.positions": (len(s.keep),) for path, s in plan.selects.items()}
    stray = [name for name in after if name not in left]
    if plan.drops and stray:
        raise PlanError(
            f"the pruned network does not follow the plan: it still has '{stray[0]}', which goes with a dropped branch. "
            "Make it with attrim.apply(model, plan)."
        )
    for name, shape in left.items():
        expected = plan.cuts[name].shape_after if name in plan.cuts else shape
        if after.get(name) != expected:
            raise PlanError(
                f"the pruned network does not follow the plan: '{name}' should have shape {expected}, found {after.get(name)}. "
                "Make it with attrim.apply(model, plan)."
            )


def _foreign(model: nn.Module, small: nn.Module, plan: PruningPlan) -> list[Conflict]:
    """Tensors of ``small`` that are not the kept positions of the original's, value by value."""
    after = named_tensors(small).tensors
    conflicts = []
    for name, tensor in named_tensors(model).tensors.items():
        kept = tensor.detach()
        for dim, indices in plan.cuts[name].keep.items() if name in plan.cuts else ():
            kept = kept.index_select(dim, torch.tensor(indices, device=kept.device))
        found = after[name].detach()
        if found.dtype != kept.dtype or not torch.equal(found.to(kept.device), kept):
            text = f"'{name}' does not hold the original's values at the kept positions; verify before any recovery"
            conflicts.append(Conflict(Reason(text)))
    return conflicts[:_SHOWN]


def _alive(analysis: Analysis, plan: PruningPlan) -> Alive:
    """label -> stays, read from the plan's cuts."""
    alive = np.ones(analysis.space.total, bool)
    for name, cut in plan.cuts.items():
        for dim, kept in cut.keep.items():
            vector = analysis.labels[name][dim]
            if vector is not None:
                alive[vector] = False
                alive[vector[list(kept)]] = True
    return alive


def _torn(analysis: Analysis, alive: Alive) -> list[Conflict]:
    """Units of which some positions go and others stay, and pinned positions that go."""
    roots = analysis.solution.roots
    some = np.zeros(len(roots), bool)
    some[roots[~alive]] = True
    bad = np.flatnonzero(some & np.bincount(roots[alive], minlength=len(roots)).astype(bool))
    conflicts = []
    for root in bad[:_SHOWN].tolist():
        gone = int(np.flatnonzero((roots == root) & ~alive)[0])
        stays = int(np.flatnonzero((roots == root) & alive)[0])
        text = f"{_position(analysis, gone)} is removed but {_position(analysis, stays)}, which belongs to it, stays"
        conflicts.append(Conflict(Reason(text)))
    pinned = [
        r for r in np.unique(roots[~alive]).tolist() if r in analysis.solution.reasons and r not in set(bad.tolist())
    ]
    for root in pinned[:_SHOWN]:
        reason = analysis.solution.reasons[root]
        text = f"{_position(analysis, root)} is removed but must stay: {reason.text}"
        conflicts.append(Conflict(Reason(text, reason.operator, reason.module, reason.source)))
    return conflicts


def _position(analysis: Analysis, label: int) -> str:
    space = analysis.space
    k = int(np.searchsorted(np.asarray(space.start), label, side="right")) - 1
    return f"{space.axes[k]}[{label - space.start[k]}]"


def _effects(analysis: Analysis, alive: Alive) -> dict[str, tuple[str, ...]]:
    parts = analysis.parts
    cut = np.unique(parts.group_of[~alive & (parts.group_of >= 0)])
    effects: dict[str, list[str]] = {}
    for g in cut.tolist():
        first = int(np.flatnonzero(parts.group_of == g)[0])
        for cause in parts.effects[g]:
            effects.setdefault(cause, []).append(_position(analysis, first).rsplit("[", 1)[0])
    return {cause: tuple(names) for cause, names in effects.items()}


def _coherence(
    analysis: Analysis, small: nn.Module, alive: Alive, example: Example
) -> tuple[list[Conflict], Conflict | None]:
    """Conflicts of ``small``, and the first operator whose result is laid out in another way than in the original."""
    engine = Engine(small, example)
    engine.real = analysis.engine.real
    units = analysis.parts.units
    carried: dict[str, list[IntArray | None]] = {
        name: [None if v is None else units[v[alive[v]]] for v in vectors] for name, vectors in analysis.labels.items()
    }
    watch = Watcher(analysis, alive, units, stop_at_conflict=False)
    run = engine.run(watch.book, carried, analysis.tracer.decisions, guide=analysis.tracer, watch=watch)
    conflicts = list(watch.book.conflicts[:_SHOWN])
    if run.failure is not None and watch.astray is None:
        conflicts.insert(0, Conflict(run.failure.reason, run.failure.op))
    return conflicts, Conflict(watch.astray.reason, watch.astray.op) if watch.astray else None
