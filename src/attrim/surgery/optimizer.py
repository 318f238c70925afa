"""Carry an optimiser over a cut: the same hyper-parameters, momentum and other state for the positions that stay."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.plan import PruningPlan, within
from attrim.errors import InputError, PlanError
from attrim.modules.names import named_tensors
from attrim.surgery.cut import cut_tensor

__all__ = ["carry_optimizer"]


def carry_optimizer(
    optimizer: torch.optim.Optimizer, plan: PruningPlan, old: nn.Module, new: nn.Module
) -> torch.optim.Optimizer:
    """An optimiser of the same kind for ``new``, with the state of ``optimizer`` for everything that was kept.

    State tensors of a parameter's shape (momentum, Adam's moments) are cut like the parameter; others (step counts) are
    copied; parameters of dropped branches go with their state. Schedulers hold on to the optimiser they were made with: make them anew.

    Args:
        optimizer: the optimiser of ``old``. Never changed.
        plan: the plan that leads from ``old`` to ``new``.
        old: the model before the cut.
        new: ``attrim.apply(old, plan)``.

    Raises:
        InputError: the optimiser holds a parameter that is not in ``old``.
        PlanError: ``new`` does not have the shapes that the plan leaves.

    Example:
        >>> small = attrim.apply(model, plan)
        >>> optimizer = attrim.carry_optimizer(optimizer, plan, model, small)
    """
    before, after = named_tensors(old), named_tensors(new)
    names = {id(tensor): name for name, tensor in before.tensors.items()}
    carried = copy.copy(optimizer)
    carried.param_groups = []
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is not None and within(name, plan.drops):
                continue
            if name is None:
                raise InputError(
                    f"the optimiser holds a parameter of shape {tuple(parameter.shape)} that is not in the old model. Pass the "
                    "model that the optimiser was made for."
                )
            kept = _counterpart(name, after.tensors.get(name), parameter, plan)
            parameters.append(kept)
            if parameter in optimizer.state:
                state[kept] = {k: _cut_state(v, parameter, name, plan) for k, v in optimizer.state[parameter].items()}
        carried.param_groups.append(
            {**{k: copy.copy(v) for k, v in group.items() if k != "params"}, "params": parameters}
        )
    carried.state = state
    return carried


def _counterpart(name: str, kept: Tensor | None, parameter: Tensor, plan: PruningPlan) -> Tensor:
    expected = plan.cuts[name].shape_after if name in plan.cuts else tuple(parameter.shape)
    if kept is None or tuple(kept.shape) != expected:
        found = None if kept is None else tuple(kept.shape)
        raise PlanError(
            f"the new model does not follow the plan: '{name}' should have shape {expected}, found {found}. "
            "Make it with attrim.apply(old, plan)."
        )
    return kept


def _cut_state(value: Any, parameter: Tensor, name: str, plan: PruningPlan) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.shape == parameter.shape and name in plan.cuts:
        return cut_tensor(value, plan.cuts[name])
    return value.clone()
