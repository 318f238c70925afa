"""Learning to rank: losses that are small when every sample orders the channels as one given order does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attrim.errors import InputError

__all__ = ["ALL_PAIRS", "Form", "Ranking", "hinge_loss", "listwise_loss", "pairwise_loss"]

Form = Literal["pairwise", "listwise", "hinge"]

ALL_PAIRS = 128
"""Up to so many channels all pairs are compared; of more, a random part in every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Which loss, and its numbers.

    Attributes:
        form: ``pairwise`` (logistic, the default), ``listwise`` (ListMLE) or ``hinge`` (of neighbours).
        temperature: scores are divided by it; > 0. Not used by ``hinge``.
        omega: how much more a pair across the cut weighs than others; >= 0, 0 weighs all alike. ``pairwise`` only.
        margin: how far neighbours shall be apart; > 0. ``hinge`` only.
        pairs: how many pairs are drawn in a step where there are more than :data:`ALL_PAIRS` channels.

    Example:
        >>> Ranking(form="listwise")(logits, order, kept=32)
    """

    form: Form = "pairwise"
    temperature: float = 1.0
    omega: float = 4.0
    margin: float = 0.5
    pairs: int = 4096

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("form", self.form in get_args(Form), f"one of {', '.join(get_args(Form))}"),
            ("temperature", _number(self.temperature) and self.temperature > 0, "a number > 0"),
            ("omega", _number(self.omega) and self.omega >= 0, "a number >= 0"),
            ("margin", _number(self.margin) and self.margin > 0, "a number > 0"),
            (
                "pairs",
                isinstance(self.pairs, int) and not isinstance(self.pairs, bool) and self.pairs > 1,
                "an int > 1",
            ),
        ):
            if not good:
                raise InputError(f"{name}: expected {expected}, found {getattr(self, name)!r}.")

    def __call__(self, scores: Tensor, order: Tensor, kept: int) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            scores: ``(B, C)``, larger for what a sample holds for more important.
            order: ``(C,)``, a permutation of the channels, the most important first.
            kept: channels that stay, in [1, C]; the cut lies between ``order[kept - 1]`` and ``order[kept]``.
        """
        ranked = scores[:, order]
        if self.form == "pairwise":
            return pairwise_loss(ranked, kept, omega=self.omega, temperature=self.temperature, pairs=self.pairs)
        if self.form == "listwise":
            return listwise_loss(ranked, temperature=self.temperature)
        return hinge_loss(ranked, margin=self.margin)


def pairwise_loss(
    ranked: Tensor, kept: int, *, omega: float = 4.0, temperature: float = 1.0, pairs: int = 4096
) -> Tensor:
    """``mean_b Σ_{i<j} w_ij softplus(-(t_i - t_j) / T) / Σ w_ij`` with ``w_ij = 1 + omega`` across the cut, else 1.

    Of more than :data:`ALL_PAIRS` channels ``pairs`` pairs are drawn, half of them across the cut, and weighted so that
    the expectation is the sum over all.

    Args:
        ranked: ``(B, C)`` scores ``t``, columns in the order that they should have; they should fall.
        kept: first column behind the cut.
        omega, temperature, pairs: see :class:`Ranking`.

    Source:
        Burges et al., "Learning to rank using gradient descent", ICML 2005 (RankNet); the weight is our own.
    """
    channels = ranked.shape[1]
    if channels < 2:
        return ranked.sum() * 0
    if channels <= ALL_PAIRS:
        first, second = torch.triu_indices(channels, channels, 1, device=ranked.device)
        weight = 1 + omega * ((first < kept) & (second >= kept)).to(ranked.dtype)
        weight = weight / weight.sum()
    else:
        first, second, weight = _drawn(channels, kept, omega, pairs, ranked)
    apart = (ranked.index_select(1, first) - ranked.index_select(1, second)) / temperature
    each: Tensor = F.softplus(-apart) * weight
    return each.sum(1).mean()


def listwise_loss(ranked: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``-log p / C`` of the order under the Plackett-Luce model with the scores ``t / T``, mean over samples.

    Args:
        ranked: ``(B, C)`` scores, columns in the order that they should have.
        temperature: see :class:`Ranking`.

    Source:
        Xia et al., "Listwise approach to learning to rank: theory and algorithm", ICML 2008 (ListMLE).
    """
    if ranked.shape[1] < 2:
        return ranked.sum() * 0
    scaled = ranked / temperature
    rest = torch.logcumsumexp(scaled.flip(1), 1).flip(1)  # log Σ_{j >= k} e^{t_j}
    return (rest - scaled).mean()


def hinge_loss(ranked: Tensor, *, margin: float = 0.5) -> Tensor:
    """``mean relu(margin - (t_k - t_{k+1}))`` over neighbours and samples.

    Args:
        ranked: ``(B, C)`` scores, columns in the order that they should have.
        margin: see :class:`Ranking`.
    """
    if ranked.shape[1] < 2:
        return ranked.sum() * 0
    return F.relu(margin - (ranked[:, :-1] - ranked[:, 1:])).mean()


def _drawn(channels: int, kept: int, omega: float, pairs: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs ``i < j`` and weights that sum to 1; from torch's own generator, so a resumed run draws the same."""
    head, tail = kept, channels - kept
    inside = (head * (head - 1) + tail * (tail - 1)) // 2
    across = head * tail
    crossing = pairs // 2 if across else 0
    device = like.device
    within = pairs - crossing
    in_head = torch.rand(within, device=device) * inside < head * (head - 1) / 2
    size = torch.where(in_head, head, tail)
    start = torch.where(in_head, 0, head)
    one = _below(size)
    other = _below(size - 1)
    other = other + (other >= one).long()
    first = [start + torch.minimum(one, other)]
    second = [start + torch.maximum(one, other)]
    if crossing:
        first.append(torch.randint(head, (crossing,), device=device))
        second.append(torch.randint(kept, channels, (crossing,), device=device))
    total = inside + across * (1 + omega)
    weight = [like.new_full((within,), inside / total / within)]
    weight += [like.new_full((crossing,), across * (1 + omega) / total / crossing)] if crossing else []
    return torch.cat(first), torch.cat(second), torch.cat(weight)


def _below(limit: Tensor) -> Tensor:
    """Random whole numbers in [0, limit), one for each limit."""
    drawn = torch.rand(limit.shape, dtype=torch.float64, device=limit.device) * limit
    return torch.minimum(drawn.long(), limit - 1)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
