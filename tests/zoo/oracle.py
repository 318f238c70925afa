"""An oracle that shares nothing with attrim: the original with the removed positions zeroed where they are consumed.

A removed channel may do whatever it likes as long as nobody hears it. So in a copy of the original every weight column
that reads a removed position is set to zero, and layer, group and RMS norms take their statistics over the positions
that stay. What this copy computes is what the pruned network must compute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from attrim.core.plan import PruningPlan

__all__ = ["forward", "leaves", "masked_original", "oracle_error"]


def forward(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple (positional) or a dict (keyword)."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def oracle_error(
    original: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    inputs: Any,
    consumers: tuple[str, ...] = (),
    producers: tuple[str, ...] = (),
) -> float | None:
    """Largest difference between the masked original and the pruned network over all outputs.

    Args:
        original: the network before the cut, float64.
        pruned: after it.
        plan: the cuts.
        inputs: as for :func:`forward`.
        consumers: globs over axes of tensors used directly that consume channels.
        producers: globs over axes whose removed rows are zeroed instead.

    Returns:
        The error, or None where nothing in the network consumes a removed position (the oracle says nothing).
    """
    masked, touched = masked_original(original, plan, consumers + producers)
    if not touched:
        return None
    expected, found = leaves(forward(masked, inputs)), leaves(forward(pruned, inputs))
    assert [e.shape for e in expected] == [f.shape for f in found]
    return max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True))


def masked_original(original: nn.Module, plan: PruningPlan, extra: tuple[str, ...] = ()) -> tuple[nn.Module, bool]:
    """A copy with zeroed columns and masked norms, and whether anything was zeroed."""
    masked = copy.deepcopy(original)
    tensors = dict(masked.named_parameters()) | dict(masked.named_buffers())
    first = {id(tensor): name for name, tensor in tensors.items()}
    axes = {(first[id(m.weight)], dim) for m, dim in _consumers(masked) if id(m.weight) in first}
    axes |= {
        (name, dim)
        for name, tensor in tensors.items()
        for dim in range(tensor.ndim)
        if any(fnmatchcase(f"{name}:{dim}", glob) for glob in extra)
    }
    touched = False
    for name, dim in sorted(axes):
        removed = _removed(plan, name, dim, tensors[name].shape[dim])
        if removed.numel():
            touched = True
            with torch.no_grad():
                tensors[name].index_fill_(dim, removed, 0.0)
    _mask_norms(masked, plan, first)
    return masked, touched


def _consumers(model: nn.Module) -> Iterator[tuple[Any, int]]:
    """Modules with a weight, and the dimension of that weight which reads the input."""
    for module in model.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList) or nn.utils.parametrize.is_parametrized(module):
            continue
        if isinstance(module, _ConvTransposeNd):
            yield module, 0
        elif isinstance(module, (_ConvNd, nn.Linear)):
            yield module, 1


def _removed(plan: PruningPlan, name: str, dim: int, size: int) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    if name in plan.cuts and dim in plan.cuts[name].keep:
        stays[:] = False
        stays[list(plan.cuts[name].keep[dim])] = True
    return (~stays).nonzero().flatten()


class _MaskedNorm(nn.Module):
    """Layer, group or RMS norm with statistics over the positions that stay."""

    def __init__(self, norm: Any, stays: Tensor) -> None:
        super().__init__()
        self.norm, self.stays = norm, stays

    def _normalise(self, x: Tensor, stays: Tensor, dims: tuple[int, ...], centre: bool, eps: float) -> Tensor:
        count = stays.expand_as(x).sum(dims, keepdim=True).clamp(min=1)
        mean = torch.where(stays, x, 0).sum(dims, keepdim=True) / count if centre else x.new_zeros(())
        square = torch.where(stays, (x - mean) ** 2, 0).sum(dims, keepdim=True) / count
        return (x - mean) / (square + eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.GroupNorm):
            shape = (x.shape[0], norm.num_groups, -1, *x.shape[2:])
            stays = self.stays.view(1, norm.num_groups, -1, *[1] * (x.ndim - 2))
            grouped = x.reshape(shape)
            x = self._normalise(grouped, stays, tuple(range(2, grouped.ndim)), True, norm.eps).reshape(x.shape)
            affine = (-1, *[1] * (x.ndim - 2))
            return x * norm.weight.view(affine) + norm.bias.view(affine)
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        if type(norm).forward is not nn.LayerNorm.forward and isinstance(norm, nn.LayerNorm):  # channels first
            moved = self._normalise(x.movedim(1, -1), self.stays, (-1,), True, eps)
            return (moved * norm.weight + norm.bias).movedim(-1, 1)
        dims = tuple(range(-len(norm.normalized_shape), 0))
        x = self._normalise(x, self.stays, dims, isinstance(norm, nn.LayerNorm), eps) * norm.weight
        return x if getattr(norm, "bias", None) is None else x + norm.bias


def _mask_norms(masked: nn.Module, plan: PruningPlan, first: dict[int, str]) -> None:
    for path, module in list(masked.named_modules()):
        if not isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or module.weight is None:
            continue
        name = first[id(module.weight)]
        stays = torch.ones(module.weight.shape, dtype=torch.bool)
        for dim, size in enumerate(module.weight.shape):
            stays.index_fill_(dim, _removed(plan, name, dim, size), False)
        if not stays.all():
            parent, _, leaf = path.rpartition(".")
            setattr(masked.get_submodule(parent), leaf, _MaskedNorm(module, stays))
