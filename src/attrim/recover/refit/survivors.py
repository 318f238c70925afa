"""Which outputs and inputs of a dense contraction are left in the pruned one, read from the plan."""

from __future__ import annotations

import torch
from torch import Tensor

from attrim.core.plan import PruningPlan
from attrim.modules.course.contractions import Contraction
from attrim.modules.course.survey import Unit

__all__ = ["kept_inputs", "kept_outputs"]


def kept_outputs(plan: PruningPlan, unit: Unit, use: Contraction, shape: torch.Size) -> Tensor:
    """Numbers of the outputs of a dense contraction that stay.

    Args:
        plan: what was cut.
        unit: the dense unit.
        use: its call.
        shape: of the dense weight.
    """
    if use.weight.shape[3] > 1 or len(shape) > 2:
        return _kept(plan, use.tensor, 0, 0, shape[0])
    dim = 1 - use.dim
    return _kept(plan, use.tensor, dim, _start(unit.offset, shape, dim), use.weight.shape[1])


def kept_inputs(plan: PruningPlan, unit: Unit, use: Contraction, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Numbers of the blocks that stay, and of the columns that stay in each of them."""
    blocks, rows, columns, _ = use.weight.shape
    if len(shape) > 2:
        outputs = kept_outputs(plan, unit, use, shape)
        return torch.unique(outputs // rows), _kept(plan, use.tensor, 1, 0, columns)
    return torch.arange(blocks), _kept(plan, use.tensor, use.dim, _start(unit.offset, shape, use.dim), columns)


def _start(offset: int, shape: torch.Size, dim: int) -> int:
    """Where a part of a matrix begins along a dimension."""
    return offset // shape[1] if dim == 0 else offset % shape[1]


def _kept(plan: PruningPlan, tensor: str, dim: int, start: int, size: int) -> Tensor:
    cut = plan.cuts.get(tensor)
    if cut is None or dim not in cut.keep:
        return torch.arange(size)
    kept = torch.tensor(cut.keep[dim], dtype=torch.int64)
    return kept[(kept >= start) & (kept < start + size)] - start
