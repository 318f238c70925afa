"""Apply a plan: a copy of the model whose tensors are cut and whose attributes tell the truth again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.plan import Cut, PruningPlan, within
from attrim.errors import InputError, PlanError
from attrim.modules.names import NamedTensors, fingerprint, named_tensors
from attrim.modules.repair import REPAIRS, Repair, read_attribute, repair_attributes, write_attribute
from attrim.modules.select import check_selects, select_inputs
from attrim.modules.skeleton import copy_with
from attrim.modules.skips import without_modules

__all__ = ["apply", "cut_tensor"]


def apply(
    model: nn.Module,
    plan: PruningPlan,
    *,
    repairs: Mapping[type[nn.Module], Repair] | None = None,
    share: bool = False,
) -> nn.Module:
    """A smaller copy of ``model``: every tensor that the plan names keeps only its listed positions.

    dtype, device, memory format, ``requires_grad``, ties between tensors, the train flag and hooks of the copy are kept;
    widths stated in attributes (``out_channels``, ``num_heads``, …) are repaired. Modules of residual branches that the plan
    drops are replaced by ``nn.Identity`` or by modules that return zeros. Needs no tracing and no data.

    Args:
        model: the model that the plan was made for (any instance of it). Never changed.
        plan: what stays.
        repairs: extra or other attribute repairs by module type, on top of torch's own.
        share: take parameters that are not cut from the model itself instead of copying them, for networks that are looked
            at and thrown away: training one trains the other. Buffers are always copied.

    Raises:
        PlanError: the plan was made for another model; the first differing tensor is named.

    Example:
        >>> small = attrim.apply(model, plan)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module to cut, found {type(model).__name__}.")
    named = named_tensors(model)
    _check_fit(named, plan)
    check_selects(model, plan)
    new = _cut_tensors(named, plan)
    if share:
        new = {**{name: named.tensors[name] for name in named.parameters}, **new}
    if plan.drops:
        small = without_modules(model, plan.drops, plan.replacements, new)
        small = _cut_stand_ins(small, plan)
    else:
        small = copy_with(model, named, new)
    keep = {name: cut.keep for name, cut in plan.cuts.items()}
    repair_attributes(small, keep, named.aliases, {**REPAIRS, **(repairs or {})})
    select_inputs(small, plan.selects)
    _write_attributes(small, plan)
    return small


def _cut_tensors(named: NamedTensors, plan: PruningPlan) -> dict[str, Tensor]:
    return {name: cut_tensor(named.tensors[name], cut) for name, cut in plan.cuts.items() if name in named.tensors}


def _cut_stand_ins(small: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cut the buffers of the modules that stand in the place of removed ones."""
    for path in _widths(plan):
        name = f"{path}.zeros"
        if name in plan.cuts:
            module = small.get_submodule(path)
            module.register_buffer("zeros", cut_tensor(module.get_buffer("zeros"), plan.cuts[name]), persistent=False)
    return small


def _widths(plan: PruningPlan) -> dict[str, int]:
    """Path of a stand-in -> length of its buffer."""
    return {path: r.width for path, r in plan.replacements.items() if r.width is not None}


def cut_tensor(tensor: Tensor, cut: Cut) -> Tensor:
    """The kept positions of ``tensor`` as a new tensor of the same kind (parameter or not, memory format, flags)."""
    kept = tensor.detach()
    for dim, indices in cut.keep.items():
        kept = kept.index_select(dim, torch.tensor(indices, device=tensor.device))
    kept = kept.to(memory_format=_memory_format(tensor), copy=not cut.keep)
    if not isinstance(tensor, nn.Parameter):
        return kept
    parameter = Tensor._make_subclass(type(tensor), kept, tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)
    return parameter


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _check_fit(named: NamedTensors, plan: PruningPlan) -> None:
    shapes = {**named.shapes, **{f"{path}.zeros": (width,) for path, width in _widths(plan).items()}}
    for name, cut in plan.cuts.items():
        if name in named.shapes and within(name, plan.drops):
            raise PlanError(
                f"the plan cuts '{name}' and also removes the module that it belongs to. Make the plan with "
                "attrim.plan_from_kept(channels, kept, drops=...)."
            )
        if name not in shapes:
            raise PlanError(
                f"the plan was made for another model: it cuts '{name}' {cut.shape_before}, and this model has no such "
                "tensor. Trace this model and allocate again."
            )
        if shapes[name] != tuple(cut.shape_before):
            raise PlanError(
                f"the plan was made for another model: '{name}' had shape {tuple(cut.shape_before)}, here it has "
                f"{shapes[name]}. Apply the plan to a fresh, uncut instance, or trace this model and allocate again."
            )
    if plan.fingerprint and plan.fingerprint != fingerprint(named.shapes):
        raise PlanError(
            f"the plan was made for another model: all tensors that it cuts fit, but the model's fingerprint is "
            f"{fingerprint(named.shapes)} and the plan's is {plan.fingerprint}, so other tensors differ. Build the model with the "
            "same arguments, or trace this model and allocate again."
        )


def _write_attributes(small: nn.Module, plan: PruningPlan) -> None:
    for path, cuts in plan.attributes.items():
        try:
            module: Any = small.get_submodule(path)
        except AttributeError as error:
            raise PlanError(
                f"the plan changes attributes of module '{path}', which this model does not have."
            ) from error
        for name, change in cuts.items():
            try:
                found = read_attribute(module, name)
            except (AttributeError, IndexError, TypeError) as error:
                raise PlanError(
                    f"the plan sets '{path}.{name}' from {change.before} to {change.after}, which this model does not have: "
                    "the plan was made for another version of its code."
                ) from error
            if found not in (change.before, change.after):  # equal to `after` where the type's own repair came first
                raise PlanError(
                    f"the plan sets '{path}.{name}' from {change.before} to {change.after}, but it is {found} here: "
                    "the plan was made for a model with other arguments."
                )
            write_attribute(module, name, change.after)
