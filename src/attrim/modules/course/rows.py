"""Rows of a regression: what one output position of a contraction reads, and what is found there."""

from __future__ import annotations

import torch
from torch import Tensor

from attrim.modules.course.contractions import Contraction

__all__ = ["input_rows", "output_rows", "places"]


def places(total: int, wanted: int, seed: int) -> Tensor:
    """``wanted`` random positions out of ``total``, or all of them; the same for the same seed."""
    if wanted >= total:
        return torch.arange(total)
    return torch.randint(total, (wanted,), generator=torch.Generator().manual_seed(seed))


def output_rows(value: Tensor, use: Contraction, at: Tensor, flipped: bool) -> Tensor:
    """Outputs at some positions.

    Args:
        value: the contraction's output, or a tensor in its layout: ``(N, O, …)`` of a convolution, ``(R, O)`` of a
            matrix product (``(O, R)`` if ``flipped``), or a batch of one such.
        use: the contraction.
        at: positions; of a convolution counted over samples, then over output pixels.
        flipped: whether the weight was the left factor.

    Returns:
        Shape ``(len(at), O)``.
    """
    at = at.to(value.device)
    if use.window is None:
        value = value[0] if value.ndim == 3 else value  # a batch of one matrix product
        return (value.T if flipped else value)[at]
    flat = value.flatten(2)
    return flat[at // flat.shape[2], :, at % flat.shape[2]]


def input_rows(use: Contraction, at: Tensor) -> Tensor:
    """What the outputs at some positions read, zero padding included; shape ``(len(at), blocks, columns, taps)``."""
    inputs = use.inputs
    at = at.to(inputs.device)
    if use.window is None:
        return inputs.flatten(3)[at]
    rank = len(use.window[0])
    kernel, stride, padding, dilation = (list(v) * (rank if len(v) == 1 else 1) for v in use.window)
    sizes = [
        (size + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, gap in zip(inputs.shape[3:], kernel, stride, padding, dilation, strict=True)
    ]
    padded = torch.nn.functional.pad(inputs, [p for size in reversed(padding) for p in (size, size)])
    pixel = torch.zeros(len(at), 1, dtype=torch.int64, device=at.device)
    rest, places_of = at % use.outputs, []
    for size in reversed(sizes):
        places_of.append(rest % size)
        rest = rest // size
    for d, place in enumerate(reversed(places_of)):
        taps = torch.arange(kernel[d], device=at.device) * dilation[d]
        line = place[:, None] * stride[d] + taps
        pixel = (pixel * padded.shape[3 + d])[:, :, None] + line[:, None, :]
        pixel = pixel.flatten(1)
    return padded.flatten(3)[(at // use.outputs)[:, None], :, :, pixel].permute(0, 2, 3, 1)
