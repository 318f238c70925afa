"""The two networks at the door: they belong to the plan, and they run in eval mode for as long as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from attrim.core.plan import PruningPlan, within
from attrim.errors import InputError, PlanError
from attrim.modules.names import fingerprint, named_tensors
from attrim.recover.evaluate import restore_modes

__all__ = ["check_networks", "evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the modes of before afterwards; buffers may be changed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        restore_modes(modes)


def check_networks(dense: nn.Module, pruned: nn.Module, plan: PruningPlan) -> None:
    """Refuse networks that are not the plan's original and its cut copy.

    Raises:
        InputError: not modules, or not a plan.
        PlanError: another original, a tensor whose shape is not what the plan leaves, or one of a dropped branch that is
            still there (it is named).
    """
    for name, model in (("dense", dense), ("pruned", pruned)):
        if not isinstance(model, nn.Module):
            raise InputError(f"{name}: expected an nn.Module, found {type(model).__name__}.")
    if not isinstance(plan, PruningPlan):
        raise InputError(f"plan: expected an attrim.PruningPlan, found {type(plan).__name__}.")
    before, after = named_tensors(dense).shapes, named_tensors(pruned).shapes
    if plan.fingerprint != fingerprint(before):
        raise PlanError(
            "the plan was not made for the dense network (the fingerprints differ). Pass the one that was traced."
        )
    for name, shape in before.items():
        if within(name, plan.drops):
            if name in after:
                raise PlanError(
                    f"pruned: '{name}' belongs to a residual branch that this plan drops, and is still there. "
                    "Make it with attrim.apply(dense, plan)."
                )
            continue
        expected = plan.shape_after(name, shape)
        if after.get(name) != expected:
            raise PlanError(
                f"pruned: '{name}' should have shape {expected} after this plan, found {after.get(name)}. "
                "Make it with attrim.apply(dense, plan)."
            )
