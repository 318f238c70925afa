"""Whether the branches that a policy drops had better stay: networks with and without them are judged on held-out data."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from attrim.core.budget import Budget
from attrim.core.plan import PruningPlan
from attrim.errors import AttrimWarning, BudgetError
from attrim.methods.dcpa.derive import Derived
from attrim.methods.dcpa.judge import Judge, Verdict

__all__ = ["Proposal", "Propose", "checked"]

Proposal: TypeAlias = tuple[PruningPlan, Derived]

Propose: TypeAlias = Callable[[Sequence[str]], Proposal]
"""The plan of a policy in which the named branches may not be dropped."""


def checked(propose: Propose, branches: Sequence[str], judge: Judge, budget: Budget, fine: bool) -> Proposal:
    """The plan of a policy, without those of its drops that make the network worse.

    If the policy drops anything, the network is judged as it is, with all branches (the widths then make up for the cost),
    and, if it drops several, with single branches back: one after the other, the first of ``branches`` first, as far as each
    lowers the loss. The lowest loss is taken, the policy's own network where there is no difference. All networks are within
    the budget; where that needs drops, the best of those that are left is taken.

    Args:
        propose: makes plans.
        branches: all that may be dropped, the one that the policy is least sure to drop first.
        judge: tells how good they are.
        budget, fine: what the plans are for; an earlier decision for the same is read from the judge's file.

    Returns:
        Plan and derivation; its ``check`` says what was compared and taken, None where nothing is dropped.
    """
    plan, derived = propose(())
    if not derived.drops:
        return plan, derived
    key = json.dumps({"budget": asdict(budget), "fine": fine, **judge.settings()}, sort_keys=True)
    known = judge.known()
    if key not in known:
        known[key] = _decide(propose, (plan, derived), branches, judge)
        judge.keep()
    found = known[key]
    if found["taken"] != "policy":
        _warn(found)
        plan, derived = propose(tuple(found["stay"]))
    return plan, replace(derived, check=found)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A network that was judged: which branches had to stay, which ones went, and how good it is."""

    stay: tuple[str, ...]
    drops: tuple[str, ...]
    verdict: Verdict

    def report(self) -> dict[str, Any]:
        loss = self.verdict.loss
        return {
            "drops": list(self.drops),
            "loss": loss if math.isfinite(loss) else None,
            "accuracy": self.verdict.accuracy,
        }


def _decide(propose: Propose, first: Proposal, branches: Sequence[str], judge: Judge) -> dict[str, Any]:
    """Judge networks until the best is found; plain values: ``taken``, ``policy``, ``dropped``, ``stay``, ``compared``."""
    rows: list[dict[str, Any]] = []

    def trial(stay: tuple[str, ...], proposal: Proposal | None = None) -> _Trial | None:
        try:
            plan, derived = propose(stay) if proposal is None else proposal
        except BudgetError as error:
            rows.append({"stay": list(stay), "refused": str(error)})
            return None
        made = _Trial(stay, derived.drops, judge(plan))
        rows.append(made.report())
        return made

    policy = trial((), first)
    whole = trial(tuple(branches))
    best = policy
    dropped = first[1].drops
    for branch in branches if len(dropped) > 1 or whole is None else ():
        if branch in dropped and best is not None:
            other = trial((*best.stay, branch))
            best = other if other is not None and other.verdict.loss < best.verdict.loss else best
    if whole is not None and best is not None and whole.verdict.loss < best.verdict.loss:
        best = whole
    if best is None or best is policy:
        return {"taken": "policy", "policy": list(dropped), "dropped": list(dropped), "stay": [], "compared": rows}
    taken = "some" if best.drops else "none"
    return {
        "taken": taken, "policy": list(dropped), "dropped": list(best.drops), "stay": list(best.stay), "compared": rows,
    }  # fmt: skip


def _warn(found: Mapping[str, Any]) -> None:
    mine = next(row for row in found["compared"] if row.get("drops") == found["dropped"])
    first = found["compared"][0]
    gone = ", ".join(f"'{b}'" for b in found["dropped"]) or "nothing"
    warnings.warn(
        f"dcpa: the policy drops {', '.join(map(repr, found['policy']))}. On held-out data the network is better if it drops "
        f"{gone} ({_said(mine)} against {_said(first)}), so that is taken. drop_check=False takes the policy at its word.",
        AttrimWarning,
        stacklevel=4,
    )


def _said(row: Mapping[str, Any]) -> str:
    loss = "no finite loss" if row["loss"] is None else f"loss {row['loss']:.4f}"
    return loss if row["accuracy"] is None else f"accuracy {row['accuracy']:.1%}, {loss}"
