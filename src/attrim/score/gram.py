"""The inputs of one consumer, summed up: a Gram matrix, or its diagonal, that does not grow with the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from attrim.core.cost import IntArray
from attrim.errors import CriterionError
from attrim.modules.course.contractions import Contraction, patches

__all__ = ["ConsumerGram", "Form", "Hessian"]

Hessian = Literal["gram", "diagonal"]
Form = Literal["channel", "patch"]

_CONSTANT = 1e-6
"""An input whose variance is less than this share of its mean square does not vary: what is left is rounding."""

_CHUNK = 1 << 24
"""Most elements of an unfolded input that are held at once."""


class ConsumerGram:
    """Running float64 sums over the inputs ``u`` of a consumer with the weight ``W``: Σ u uᵀ and Σ u.

    Args:
        use: the first call; it fixes the layout.
        hessian: ``gram`` keeps Σ u uᵀ, ``diagonal`` only Σ u².
        form: ``patch``: u holds all columns · taps that one output reads; ``channel``: u holds the columns at one input
            pixel, shared by all taps. The same thing for a kernel of one pixel and for a linear layer.
    """

    def __init__(self, use: Contraction, hessian: Hessian, form: Form) -> None:
        blocks, _, columns, taps = use.weight.shape
        self.tensor, self.dim, self.hessian = use.tensor, use.dim, hessian
        self._by_patch = use.window is not None and (form == "patch" or taps == 1)
        self.weight = use.weight.flatten(2) if self._by_patch else use.weight.transpose(2, 3).flatten(1, 2)
        self._taps = taps if self._by_patch else 1
        self._spread = use.window is None and blocks > 1
        width = columns * self._taps
        self._device = torch.device("cpu") if use.inputs.device.type == "mps" else use.inputs.device
        self._second = self._zeros(blocks, width, width) if hessian == "gram" else self._zeros(blocks, width)
        self._first = self._zeros(blocks, width)
        self._count = 0.0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        return self._second.nbytes + self._first.nbytes

    def add(self, use: Contraction) -> None:
        """Take the inputs of one call in."""
        samples = len(use.inputs)
        share = max(1, use.inputs.numel() * self._taps // max(1, samples))
        for part in torch.split(use.inputs, max(1, _CHUNK // share)):
            self._add(replace(use, inputs=part, window=use.window if self._by_patch else None))
        self._count += samples * use.outputs

    def _add(self, use: Contraction) -> None:
        values = patches(use)
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        # Squares of very small single-precision numbers vanish, and a matrix of such squares is not positive.
        largest = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
        values = values / largest
        # A tap sees one input pixel per output: in channel form the pixels stand for the outputs.
        scale = 1.0 if self._by_patch else use.outputs * len(use.inputs) / max(1, values.shape[2])
        unit = largest.to(self._device, torch.float64)
        second = values @ values.mT if self.hessian == "gram" else values.square().sum(2)
        self._second += scale * unit.square() * second.to(self._device, torch.float64)
        self._first += scale * unit * values.sum(2).to(self._device, torch.float64)

    def saliency(self, index: IntArray, samples: int, damping: float, centred: bool) -> Tensor:
        """``½ tr W_c B_c W_cᵀ`` for each channel; shape ``(size,)``, float64 on the CPU.

        ``B_c`` is the inverse of the channel's block of H⁻¹, or the channel's diagonal of H. A channel whose inputs are
        all zero (when centred: all equal) gets exactly 0.

        Args:
            index: shape ``(size, k)``; each channel's positions along the contracted axis.
            samples: by which the sums are divided.
            damping: added to the diagonal of H, as a fraction of its mean.
            centred: subtract the mean first, as when the consumer's bias is refitted as well.
        """
        moments = self._moments(samples, centred)
        if self._spread:
            return self._spread_saliency(moments, index, damping, samples)
        columns = torch.from_numpy(index).to(self._device)
        columns = (columns[:, :, None] * self._taps + torch.arange(self._taps, device=self._device)).flatten(1)
        return self._by_columns(moments, columns, damping, samples).sum(0).cpu()

    def _spread_saliency(self, moments: Tensor, index: IntArray, damping: float, samples: int) -> Tensor:
        """A transposed convolution with groups: its axis runs through all blocks, which do not interact."""
        each = torch.arange(moments.shape[1], device=self._device)[:, None]
        single = self._by_columns(moments, each, damping, samples).flatten()
        return single[torch.from_numpy(index).to(self._device)].sum(1).cpu()

    def _moments(self, samples: int, centred: bool) -> Tensor:
        if not bool(self._second.isfinite().all()):
            raise CriterionError(
                f"the inputs of '{self.tensor}' are NaN or infinite: look for NaN in the data or the weights."
            )
        if not centred:
            return self._second / samples
        mean = self._first / max(self._count, 1.0)
        outer = mean[:, :, None] * mean[:, None, :] if self.hessian == "gram" else mean.square()
        return (self._second - self._count * outer) / samples

    def _by_columns(self, moments: Tensor, columns: Tensor, damping: float, samples: int) -> Tensor:
        """Saliency of removing ``columns[c]`` together; ``(blocks, size)``."""
        weight = self.weight.to(self._device, torch.float64)[:, :, columns].permute(0, 2, 3, 1)
        energy = self._diagonal(moments)
        if self.hessian == "diagonal":
            return 0.5 * (weight.square().sum(3) * energy[:, columns]).sum(2)
        dead = energy <= _CONSTANT * self._diagonal(self._second) / samples
        mean = energy.mean(1, keepdim=True)
        # A dead column does not interact with the others; any positive number of their size keeps H invertible.
        ridge = damping * mean + torch.where(dead, torch.where(mean > 0, mean, 1.0), 0.0)
        inverse = _inverse(moments, ridge, self.tensor)
        block = inverse[:, columns[:, :, None], columns[:, None, :]]
        if columns.shape[1] == 1:
            value = weight.square().sum((2, 3)) / block.flatten(2).squeeze(2)
        else:
            value = (weight * torch.linalg.solve(block, weight)).sum((2, 3))
        return torch.where(dead[:, columns].all(2), 0.0, 0.5 * value)

    def _diagonal(self, moments: Tensor) -> Tensor:
        return moments.diagonal(dim1=1, dim2=2) if self.hessian == "gram" else moments


def _inverse(moments: Tensor, ridge: Tensor, tensor: str) -> Tensor:
    """``(H + diag(ridge))⁻¹`` of each block; ``ridge`` has shape ``(blocks, width)``."""
    factor, failed = torch.linalg.cholesky_ex(moments + torch.diag_embed(ridge))
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    rounding = torch.finfo(torch.float64).eps * pivots.shape[1] * pivots.amax(1)
    if bool((failed.ne(0) | (pivots.amin(1) <= rounding)).any()):
        raise CriterionError(
            f"the Gram matrix of the inputs of '{tensor}' is singular: there are fewer samples than channels, or "
            "channels repeat each other. Give more data or a larger damping (the default is damping=1e-3)."
        )
    return torch.cholesky_inverse(factor)
