"""Writing a fit into a network without adding a tensor to it: weight, bias, or the batch norm behind."""

from __future__ import annotations

import torch
from torch import Tensor

from attrim.modules.course.follow import Site
from attrim.recover.refit.fit import Change
from attrim.recover.refit.sums import Moments

__all__ = ["add_constant", "write"]

_DEAD = 1e-8
"""Outputs whose scale is below this share of the largest are not heard, and their rows stay."""


def write(site: Site, change: Change, inputs: Tensor) -> None:
    """Put a change into the weights.

    The constant goes into the bias, or into the running mean of the batch norm that follows. A batch norm that follows
    also gets the running statistics that its new input has, with weight and bias changed such that the function in eval
    mode stays the same: so measuring the statistics again, or training, starts from the fitted network and does not undo
    it.

    Args:
        site: where to.
        change: what the fit found, in units of the place of comparison.
        inputs: the rows, for the statistics of layers that were solved in blocks of columns.
    """
    heard = site.scale.abs() > _DEAD * site.scale.abs().amax().clamp_min(1e-300)
    gain = torch.where(heard, site.scale, 1.0)
    blocks, rows = site.weight.shape[:2]
    step = change.weight / gain.view(blocks, rows, 1)
    step = torch.where(heard.view(blocks, rows, 1), step, 0.0)
    site.weight.add_(step.view(site.weight.shape).to(site.weight.dtype))
    add_constant(site, torch.where(heard, change.bias / gain, 0.0))
    if site.norm is not None and site.norm.weight is not None and site.norm.bias is not None:
        _settle(site, change.moments, inputs)


def add_constant(site: Site, constant: Tensor) -> bool:
    """Add a constant to each output of the contraction; False if there is no place for it.

    Args:
        site: where to.
        constant: float64, shape ``(outputs,)``.
    """
    if site.unit.bias and site.bias is not None:
        site.bias.add_(constant.view(site.bias.shape).to(site.bias.dtype))
    elif site.norm is not None:
        site.norm.mean.sub_(constant.to(site.norm.mean.dtype))
    else:
        return not bool(constant.any())
    return True


def _settle(site: Site, moments: Moments, inputs: Tensor) -> None:
    """Running statistics that are true for the new weights; the eval-mode function does not change."""
    norm = site.norm
    if norm is None or norm.weight is None or norm.bias is None:
        return
    mean, square = moments.outputs(site.weight.flatten(2), inputs)
    var = (square - mean.square()).clamp_min(0)
    if site.bias is not None:
        mean = mean + site.bias.double().flatten()
    gain = norm.weight.double() / (norm.var.double() + norm.eps).sqrt()
    bias = norm.bias.double() + gain * (mean - norm.mean.double())
    norm.weight.copy_(gain * (var + norm.eps).sqrt())
    norm.bias.copy_(bias)
    norm.mean.copy_(mean)
    norm.var.copy_(var)
