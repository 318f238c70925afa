"""A cut network and the masked original side by side, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.capture import Analysis
from attrim.trace.labels import Recorder
from attrim.trace.probe import Alive
from attrim.trace.rules.contract import CONTRACTED
from attrim.trace.rules.reduce import REDUCED, reduced_dims
from attrim.trace.run import Engine, Run
from attrim.trace.tracer import Tracer

__all__ = ["TOLERANCE", "compare", "exact_part", "relative"]

TOLERANCE = 1e-9
"""Largest relative difference in float64 that counts as equal."""


def exact_part(analysis: Analysis, alive: Alive) -> Alive:
    """The same cut without the channels whose removal is not exact."""
    parts = analysis.parts
    inexact = np.asarray([bool(e) for e in parts.effects] + [False])
    return np.asarray(alive | inexact[parts.group_of])


def compare(analysis: Analysis, small: nn.Module | None, alive: Alive) -> tuple[float, str, Reason | None]:
    """Largest relative difference; in the model's own precision only where float64 cannot run. With a failed run, why."""
    result = _compare(analysis, small, alive, torch.float64)
    if not isinstance(result, Reason):
        return result, "float64", None
    result = _compare(analysis, small, alive, None)
    if not isinstance(result, Reason):
        return result, "the model's own precision", None
    return float("inf"), "float64", result


def _compare(analysis: Analysis, small: nn.Module | None, alive: Alive, dtype: torch.dtype | None) -> float | Reason:
    """Run the masked original and the cut network side by side; the reason if one of them cannot run in ``dtype``."""
    tracer = analysis.tracer
    engine = Engine(analysis.engine.model, analysis.engine.example)
    engine.real, engine.dtype, engine.sums = True, dtype, True
    masked = engine.run(Recorder(), analysis.labels, tracer.decisions, mask=_mask(alive), guide=tracer)
    if small is not None:
        engine = Engine(small, analysis.engine.example)
        engine.real, engine.dtype, engine.sums = True, dtype, True
        cut = engine.run(Recorder(), _blank(engine), tracer.decisions, guide=tracer)
    else:
        keep, attributes = _keep(analysis, alive), analysis.attributes_at(alive)
        cut = engine.run(Recorder(), _blank(engine), tracer.decisions, keep, attributes, guide=tracer)
    for run in (masked, cut):
        if run.failure is not None:
            return run.failure.reason
    return max(_difference(masked, cut), _difference_inside(masked, cut, alive))


def _blank(engine: Engine) -> dict[str, list[IntArray | None]]:
    return {name: [None] * tensor.ndim for name, tensor in engine.named.tensors.items()}


def _keep(analysis: Analysis, alive: Alive) -> dict[str, dict[int, IntArray]]:
    keep: dict[str, dict[int, IntArray]] = {}
    for name, vectors in analysis.labels.items():
        for d, vector in enumerate(vectors):
            if vector is not None and not alive[vector].all():
                keep.setdefault(name, {})[d] = np.flatnonzero(alive[vector])
    return keep


def _difference(masked: Run, cut: Run) -> float:
    """Largest relative difference over all outputs."""
    worst = 0.0
    for a, b in zip(masked.outputs, cut.outputs, strict=True):
        if a.is_floating_point():
            worst = max(worst, relative(a, b))
        elif a.shape != b.shape or not torch.equal(a, b):
            worst = float("inf")
    return worst


def _difference_inside(masked: Run, cut: Run, alive: Alive) -> float:
    """The same over the averages of every leaf module's surviving channels: a head of zeros must not hide a fault."""
    worst = 0.0
    ours, theirs = masked.tracer.sums or [], cut.tracer.sums or []
    if len(ours) != len(theirs):
        return worst  # another course of modules; the outputs decide
    for (_, _, value), a, b in zip(masked.tracer.taps, ours, theirs, strict=True):
        for d, vector in enumerate(v for v in value.axes if v is not None):
            if a.numel():
                a = a.index_select(d, torch.from_numpy(np.flatnonzero(alive[vector])).to(a.device))
        worst = max(worst, relative(a, b))
    return worst


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of ``a``; infinite for other shapes or NaN."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    gap = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)
    return gap if gap == gap else float("inf")


def _mask(alive: Alive) -> Any:
    """Zero the removed positions of activations in every argument that an operator sums over."""

    def mask(call: Call, t: Tracer) -> tuple[Sequence[Any], Mapping[str, Any]]:
        places = list(CONTRACTED.get(call.name, ()))
        if call.name in REDUCED and call.inputs:
            first = next(name for name in ("self", "x", "input") if call.has(name))
            places = [(first, d) for d in reduced_dims(call, call.inputs[0].ndim)]
        args, kwargs = call.args, call.kwargs
        for name, dim in places:
            tensor: Tensor = call[name]
            value = t.value(tensor)
            vector = value.axes[dim] if value.live and tensor.ndim else None
            if vector is not None and not alive[vector].all():
                shape = [-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)]
                stays = torch.from_numpy(alive[vector]).to(tensor.device).view(shape)
                hidden = torch.where(stays, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
                hidden._attrim_value = value  # type: ignore[attr-defined]
                args, kwargs = _replaced(call, args, kwargs, name, hidden)
                call.args, call.kwargs = args, kwargs
        return args, kwargs

    return mask


def _replaced(
    call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, tensor: Tensor
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if name in kwargs:
        return args, {**kwargs, name: tensor}
    position = [a.name for a in call.func._schema.arguments].index(name)
    return [*args[:position], tensor, *args[position + 1 :]], kwargs
