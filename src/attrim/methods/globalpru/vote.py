"""Majority votes: every sample orders the channels, and the votes are counted into one order for all samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from attrim.errors import InputError
from attrim.modules.distributed import all_sum

__all__ = ["Ballot", "Votes", "pair_wins"]

Ballot = Literal["pairwise", "position", "topk", "borda", "mean", "random"]

_CHUNK = 2**20
"""Comparisons that are held in memory at once; what fits a processor's cache is several times as fast as more."""

_SAMPLES = 255
"""Samples that are counted together in one byte."""


@dataclass(eq=False)
class Votes:
    """Votes on the channels of one group, counted as they come; memory does not grow with the samples.

    * ``pairwise``: ``V[i, j]`` samples hold ``i`` for more important than ``j``. A channel gets a point for every other
      one that it beats by majority, half a point for a draw (Copeland). A channel that beats all others is first.
    * ``position``: places are filled from the first on, each with the channel that most samples have there or before.
    * ``topk``: how many samples have a channel among their first ``kept``.
    * ``borda``: mean rank.
    * ``mean``: mean attention; no vote, for comparison.
    * ``random``: a random order, for comparison.

    Draws are decided by mean rank, then the lower index.

    Args:
        ballot: one of the above.
        size: number of channels ``C``.
        kept: channels that stay, for ``topk``.
        seed: for ``random``.

    Attributes:
        samples: ballots so far; several places of a group vote each for itself.
        spoken: 0-dim: how many of them tell any channels apart.
        ranks: ``(C,)`` float64: sum of the ranks, from 0 for the most important.
        table: float64: ``(C, C)`` for ``pairwise`` and ``position``, ``(C,)`` for ``topk`` and ``mean``, else empty.

    Raises:
        InputError: an unknown ballot.

    Example:
        >>> votes = Votes("pairwise", 3)
        >>> votes.add(torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.4, 0.6]]))
        >>> votes.order()
        tensor([1, 2, 0])

    Source:
        That a majority vote ranks the channels: Wang et al., GlobalPru, Neural Networks 171, 2024. The ballots are our
        reading of it.
    """

    ballot: Ballot
    size: int
    kept: int = 1
    seed: int = 0
    samples: float = 0.0
    spoken: Tensor = field(init=False)
    ranks: Tensor = field(init=False)
    table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.ballot not in get_args(Ballot):
            raise InputError(f"vote: expected one of {', '.join(get_args(Ballot))}, found {self.ballot!r}.")
        shape = {"pairwise": (self.size, self.size), "position": (self.size, self.size)}.get(
            self.ballot, (self.size if self.ballot in ("topk", "mean") else 0,)
        )
        self.spoken = torch.zeros((), dtype=torch.float64)
        self.ranks = torch.zeros(self.size, dtype=torch.float64)
        self.table = torch.zeros(shape, dtype=torch.float64)

    def add(self, scores: Tensor, attention: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            scores: ``(B, C)``, larger for more important; equal scores of a sample count in the order of the index, and as
                a draw in ``pairwise``.
            attention: ``(B, C)``, what ``mean`` takes the mean of; None takes the scores.
        """
        scores = scores.detach()
        self.ranks, self.table = self.ranks.to(scores.device), self.table.to(scores.device)
        self.spoken = self.spoken.to(scores.device) + (scores.amax(1) > scores.amin(1)).sum()
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(self.size, device=scores.device).expand_as(ranked)
        rank = torch.empty_like(ranked).scatter_(1, ranked, places)
        self.ranks += rank.sum(0)
        self.samples += len(scores)
        if self.ballot == "pairwise":
            self.table += pair_wins(scores)
        elif self.ballot == "position":
            cells = (places[0] * self.size + rank).reshape(-1)
            self.table += torch.bincount(cells, minlength=self.size**2).reshape(self.size, self.size)
        elif self.ballot == "topk":
            self.table += (rank < self.kept).sum(0)
        elif self.ballot == "mean":
            self.table += (scores if attention is None else attention.detach()).double().sum(0)

    def recall(self, before: Votes, weight: float = 0.5) -> None:
        """Add what was counted in an earlier vote, at ``weight``."""
        self.ranks = self.ranks + weight * before.ranks.to(self.ranks.device)
        self.table = self.table + weight * before.table.to(self.table.device)
        self.samples += weight * before.samples

    def sum_over_processes(self) -> None:
        """Add up what all processes have counted; each has to call it."""
        samples = torch.tensor([self.samples], dtype=torch.float64, device=self.ranks.device)
        all_sum(self.ranks, self.table, samples, self.spoken)
        self.samples = float(samples)

    def order(self, alive: Tensor | None = None) -> Tensor:
        """The channels by importance, the most important first: ``(C,)`` int64 on the CPU.

        Args:
            alive: ``(C,)`` bool; channels that are not come last, whatever the votes say.
        """
        if self.ballot == "random":
            merit = np.random.default_rng(self.seed).permutation(self.size).astype(np.float64)
        elif self.ballot == "borda" or not self.samples:
            merit = np.zeros(self.size)
        elif self.ballot == "pairwise":
            merit = _copeland(self.table).cpu().numpy()
        elif self.ballot == "position":
            merit = -_positions(self.table.cpu().numpy(), self.ranks.cpu().numpy())
        else:
            merit = self.table.cpu().numpy()
        dead = np.zeros(self.size, bool) if alive is None else ~alive.cpu().numpy().astype(bool)
        keys = (np.arange(self.size), self.ranks.cpu().numpy(), -merit, dead)  # the last is compared first
        return torch.from_numpy(np.lexsort(keys))


def pair_wins(scores: Tensor) -> Tensor:
    """``(C, C)`` int64: in how many rows of ``scores`` ``(B, C)`` channel ``i`` is larger than channel ``j``."""
    size = scores.shape[1]
    wins = torch.zeros(size, size, dtype=torch.int64, device=scores.device)
    for part in torch.split(scores, _SAMPLES):
        rows = max(1, _CHUNK // (len(part) * size))
        for start in range(0, size, rows):
            larger = part[:, start : start + rows, None] > part[:, None, :]
            wins[start : start + rows] += larger.view(torch.uint8).sum(0, dtype=torch.uint8)
    return wins


def _copeland(table: Tensor) -> Tensor:
    draws = (table == table.T).sum(1) - 1
    return (table > table.T).sum(1).double() + 0.5 * draws.double()


def _positions(counts: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Each channel's place, when every place goes to the free channel that most samples have there or before."""
    reached = counts.cumsum(1)
    tiebreak = np.lexsort((np.arange(len(ranks)), ranks))  # of equals, argmax takes the first
    reached = reached[tiebreak]
    place = np.empty(len(ranks))
    for k in range(len(ranks)):
        best = int(reached[:, k].argmax())
        place[tiebreak[best]] = k
        reached[best] = -1
    return place
