"""The proof for selected inputs: the same network with whole inputs and zeros in the weights, then the selection itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.core.plan import Cut, PruningPlan
from attrim.modules.names import named_tensors
from attrim.modules.select import positions_of
from attrim.modules.skeleton import copy_with
from attrim.trace.capture import Analysis
from attrim.trace.compare import relative
from attrim.trace.inputs import Example
from attrim.trace.labels import Conflict, Recorder
from attrim.trace.run import Engine

__all__ = ["Widened", "compare_alike", "widened"]


@dataclass(frozen=True, slots=True)
class Widened:
    """A plan's selections taken out of the question.

    Attributes:
        model: the original with zeros in the columns of its weights that read what is not selected: the same as zeros in
            these layers' inputs.
        small: the pruned network with layers that read all of their inputs, with such zeros.
        plan: the plan without its selections, from one to the other.
        conflicts: layers of the pruned network that read something else than the plan says.
    """

    model: nn.Module
    small: nn.Module
    plan: PruningPlan
    conflicts: tuple[Conflict, ...]


def widened(model: nn.Module, small: nn.Module, plan: PruningPlan, analysis: Analysis) -> Widened:
    """Both networks with whole inputs. Neither of the given ones is changed."""
    cuts: dict[str, Cut] = dict(plan.cuts)
    for path in plan.selects:
        keep = dict(cuts.pop(f"{path}.weight").keep)
        del keep[1]
        if keep:
            cuts[f"{path}.weight"] = Cut(plan.cuts[f"{path}.weight"].shape_before, keep)
    gone = _gone(analysis, cuts)
    zeroed: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    conflicts: list[Conflict] = []
    before, after = named_tensors(model), named_tensors(small)
    for path in plan.selects:
        name = f"{path}.weight"
        cut = plan.cuts[name]
        vector = analysis.labels[name][1]
        stays = np.arange(cut.shape_before[1]) if vector is None else np.flatnonzero(~gone[vector])
        if len(stays) < cut.shape_before[1]:
            old = cuts.get(name, Cut(cut.shape_before, {}))
            cuts[name] = Cut(cut.shape_before, {**old.keep, 1: tuple(stays.tolist())})
        read = np.minimum(np.searchsorted(stays, cut.keep[1]), len(stays) - 1)
        agrees = np.array_equal(stays[read], cut.keep[1])
        if not agrees or not _reads(model.get_submodule(path), small.get_submodule(path), read):
            text = f"'{path}' reads other positions of its input than its weight was cut to"
            conflicts.append(Conflict(Reason(text, module=path)))
        zeroed[name] = _only(before.tensors[name], cut.keep[1])
        wide[name] = _spread(after.tensors[name], read, len(stays))
    order = [name for name in (*named_tensors(model).tensors, *plan.cuts) if name in cuts]
    rest = replace(plan, cuts={name: cuts[name] for name in dict.fromkeys(order)}, selects={})
    spread = copy_with(small, after, wide)
    for path in plan.selects:
        _whole(model.get_submodule(path), spread.get_submodule(path))
    return Widened(copy_with(model, before, zeroed), spread, rest, tuple(conflicts))


def _gone(analysis: Analysis, cuts: Mapping[str, Cut]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """label -> goes with what these cuts remove."""
    roots = analysis.solution.roots
    alive = np.ones(analysis.space.total, bool)
    for name, cut in cuts.items():
        for dim, kept in cut.keep.items():
            vector = analysis.labels[name][dim] if name in analysis.labels else None
            if vector is not None:
                alive[vector] = False
                alive[vector[list(kept)]] = True
    dead = np.zeros(len(roots), bool)
    dead[roots[~alive]] = True
    return np.asarray(dead[roots])


def _reads(original: nn.Module, selecting: nn.Module, read: IntArray) -> bool:
    """Whether a layer of the pruned network reads these positions of what the original's layer reads."""
    earlier, now = positions_of(original), positions_of(selecting)
    if now is None:
        return False
    expected = torch.from_numpy(read)
    expected = expected if earlier is None else earlier.cpu().index_select(0, expected)
    return torch.equal(now.cpu(), expected)


def _only(weight: Tensor, kept: tuple[int, ...]) -> Tensor:
    result = torch.zeros_like(weight.detach())
    index = torch.tensor(kept, device=weight.device)
    result.index_copy_(1, index, weight.detach().index_select(1, index))
    return nn.Parameter(result, weight.requires_grad)


def _spread(weight: Tensor, read: IntArray, width: int) -> Tensor:
    result = weight.new_zeros((weight.shape[0], width, *weight.shape[2:]))
    result.index_copy_(1, torch.from_numpy(read).to(weight.device), weight.detach())
    return nn.Parameter(result, weight.requires_grad)


def _whole(original: nn.Module, module: nn.Module) -> None:
    """Make a layer read what the original's layer reads; its weight is as wide already."""
    earlier = positions_of(original)
    if earlier is None:
        del module.positions
        module.__class__ = type(original)
    else:
        module.register_buffer("positions", earlier.to(module.positions.device), persistent=False)  # type: ignore[arg-type]
    width = module.weight.shape[1]  # type: ignore[index]
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", width)


def compare_alike(one: nn.Module, other: nn.Module, example: Example) -> tuple[float, str]:
    """Largest relative difference of two networks of the same modules: outputs, and averages of every leaf module."""
    error = _error(one, other, example, torch.float64)
    if error is not None:
        return error, "float64"
    error = _error(one, other, example, None)
    return float("inf") if error is None else error, "the model's own precision"


def _error(one: nn.Module, other: nn.Module, example: Example, dtype: torch.dtype | None) -> float | None:
    """None if one of them does not run in ``dtype``."""
    shown = []
    for model in (one, other):
        engine = Engine(model, example)
        engine.real, engine.dtype, engine.sums = True, dtype, True
        blank: Mapping[str, Any] = {n: [None] * t.ndim for n, t in engine.named.tensors.items()}
        run = engine.run(Recorder(), blank, {})
        if run.failure is not None:
            return None
        shown.append([*run.outputs, *(run.tracer.sums or [])])
    if len(shown[0]) != len(shown[1]):
        return float("inf")
    return max((_gap(a, b) for a, b in zip(*shown, strict=True)), default=0.0)


def _gap(a: Tensor, b: Tensor) -> float:
    if a.is_floating_point() or a.shape != b.shape:
        return relative(a, b)
    return 0.0 if torch.equal(a, b) else float("inf")
