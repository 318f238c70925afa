"""Drawing from the policy: Gumbel softmax with straight-through gradients, for widths, branches and single channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Draw", "Sampling", "Temperature", "decided", "gumbel", "pick", "switch", "two_paths"]

Sampling = Literal["hard", "soft", "tas"]


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """One network out of the search space, shared by a whole batch.

    Attributes:
        mask: shape ``(channels,)``, flat; 0 or 1 in value (between, for soft samples).
        gates: shape ``(U,)``; 0 where the unit's branch is dropped.
        mixes: group -> ``(size, size)``, for two-path samples: what each channel is made of.
    """

    mask: Tensor
    gates: Tensor
    mixes: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> Draw:
        """The same without gradients."""
        return Draw(self.mask.detach(), self.gates.detach(), {g: m.detach() for g, m in self.mixes.items()})


@dataclass(frozen=True, slots=True)
class Temperature:
    """``low + (high - low) (1 + cos(pi t)) / 2`` for ``t`` in [0, 1).

    Source:
        The code of Dong and Yang, "Network Pruning via Transformable Architecture Search", NeurIPS 2019.

    Example:
        >>> Temperature(5.0, 0.1)(0.0)
        5.0
    """

    high: float
    low: float

    def __call__(self, t: float) -> float:
        return self.low + (self.high - self.low) * (1 + math.cos(math.pi * t)) / 2


def gumbel(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, drawn on the CPU (the same on every device and in every process) and finite."""
    while True:
        noise = -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()
        if bool(noise.isfinite().all()):
            return noise.to(like.device, like.dtype)


def decided(log_probabilities: Tensor, drop: Tensor) -> Tensor:
    """What is likeliest in two parts, as the draws are made: first whether a branch goes, then which width it has.

    The likeliest width gets the probability of keeping anything, the others as much less as they are less likely. So a
    branch goes when that is likelier than not, and not because keeping is shared out among many widths.

    Args:
        log_probabilities: shape ``(U, K)``.
        drop: shape ``(U,)``, bool: whether candidate 0 is "drop".

    Returns:
        Shape ``(U, K)``; the largest of each row is the decision.

    Example:
        >>> decided(torch.tensor([[0.4, 0.2, 0.1, 0.3]]).log(), torch.tensor([True])).exp()
        tensor([[0.4000, 0.4000, 0.2000, 0.6000]])
    """
    widths = log_probabilities[:, 1:]
    if not widths.shape[1]:
        return log_probabilities
    raised = widths + widths.logsumexp(1, keepdim=True) - widths.amax(1, keepdim=True)
    return torch.where(drop[:, None], torch.cat([log_probabilities[:, :1], raised], 1), log_probabilities)


def pick(
    logits: Tensor, drop: Tensor, tau: float | None, generator: torch.Generator | None, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """Candidates for all units, in two parts: the width among the candidates that keep something, and keep or drop.

    The width never comes from "drop": otherwise the gradient of keeping would see nothing but what an emptied branch
    gives, and batch norms would learn the statistics of zeros.

    Args:
        logits: shape ``(U, K)``; padding is far below everything else.
        drop: shape ``(U,)``, bool: whether candidate 0 is "drop".
        tau: temperature; None for the most probable, without noise.
        generator: of the noise.
        soft: leave the sample soft.

    Returns:
        Choice ``(U, K)``, one-hot in value, and gates ``(U,)``; both with the gradient of the soft sample.

    Source:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017; the two parts are ours.
    """
    scaled = F.log_softmax(logits, 1)
    if tau is not None:
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        scaled = (scaled + gumbel(scaled.shape, scaled, generator)) / tau
    first = F.one_hot(torch.zeros_like(drop, dtype=torch.int64), logits.shape[1]).bool()
    wide = scaled.masked_fill(first & drop[:, None], -1e30).softmax(1)
    gone = scaled.softmax(1)[:, 0] * drop
    if soft:
        return wide, 1 - gone
    hard = F.one_hot(wide.argmax(1), logits.shape[1]).to(wide.dtype)
    best = scaled if tau is not None else decided(scaled, drop)
    dropped = ((best.argmax(1) == 0) & drop).to(gone.dtype)
    return hard + (wide - wide.detach()), 1 - dropped - (gone - gone.detach())


def switch(logits: Tensor, tau: float | None, generator: torch.Generator | None, soft: bool = False) -> Tensor:
    """Gates of single channels: ``σ((l + Logistic(0, 1)) / tau)``, thresholded at 0.5 with a straight-through gradient.

    Source:
        Maddison et al., "The Concrete Distribution", ICLR 2017.
    """
    if tau is None:
        return (logits >= 0).to(logits.dtype)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    noise = gumbel(logits.shape, logits, generator) - gumbel(logits.shape, logits, generator)
    open_ = ((logits + noise) / tau).sigmoid()
    return open_ if soft else (open_ >= 0.5).to(open_.dtype) + (open_ - open_.detach())


def two_paths(logits: Tensor, drop: Tensor, tau: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two distinct candidates for each unit, their weights, and gates.

    Returns:
        Indices ``(U, 2)``, weights ``(U, 2)`` that sum to 1, gates ``(U,)``. A unit with one candidate has it twice.

    Source:
        The code of TAS (see :class:`Temperature`); the gates are ours.
    """
    _, gates = pick(logits, drop, tau, generator)
    noisy = (F.log_softmax(logits, 1) + gumbel(logits.shape, logits, generator)) / tau
    first = F.one_hot(torch.zeros_like(drop, dtype=torch.int64), logits.shape[1]).bool()
    usable = (logits > -1e3) & ~(first & drop[:, None])
    noisy = noisy.masked_fill(~usable, -1e30)
    chances = (noisy.detach().softmax(1) + 1e-7).masked_fill(~usable, 0).cpu().double()
    alone = usable.sum(1).cpu() < 2
    chances[alone] = chances[alone] + 1e-300
    index = torch.multinomial(chances, 2, generator=generator).to(logits.device)
    index[alone.to(index.device), 1] = index[alone.to(index.device), 0]
    return index, noisy.gather(1, index).softmax(1), gates
