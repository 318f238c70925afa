"""What sparse training adds to the loss of the task: every sample's scores towards the global order, the tail towards zero."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attrim.methods.globalpru.losses import Ranking
from attrim.methods.globalpru.scores import Reader
from attrim.modules.gates import Gated

__all__ = ["TowardsOrder"]


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """One group's order, on the device of the last batch."""

    order: Tensor
    kept: int


class TowardsOrder:
    """``ramp · λ_r · mean_l LTR(s_l, π_l) + λ_s · mean_l mean_{b, c in tail} a_l``, over the groups ``l``.

    The ramp rises on a straight line from 0 to 1 over the first part of the whole sparse training. A regularizer for
    :func:`attrim.recover.finetune`; it reads what the gates of a :class:`attrim.modules.gates.Gated` gave in the forward
    pass just made.

    Args:
        orders: group -> ``(C,)``, the most important channel first.
        kept: group -> how many stay; the others are the tail.
        ranking: the loss LTR.
        strength: ``λ_r``.
        sparsity: ``λ_s``.
        ramp: share of the whole training in which the first term rises; 0 has it in full from the start.
        reader: what is ranked.
        part: which part of the whole training this is: from and to, in [0, 1].

    Attributes:
        seen: the network of the latest call; until :meth:`forget`.

    Source:
        That sparse training has a learn-to-rank regularisation: Wang et al., GlobalPru, 2024. Its form, the ramp and the
        term of the tail are our reading.
    """

    def __init__(
        self,
        orders: Mapping[str, Tensor],
        kept: Mapping[str, int],
        *,
        ranking: Ranking,
        strength: float,
        sparsity: float,
        ramp: float,
        reader: Reader,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.targets = {group: _Target(orders[group], kept[group]) for group in orders}
        self.ranking, self.strength, self.sparsity, self.ramp = ranking, strength, sparsity, ramp
        self.reader, self.part = reader, part
        self.seen: Gated | None = None
        digest = zlib.crc32(b"".join(t.order.numpy().tobytes() + bytes([t.kept % 256]) for t in self.targets.values()))
        self.__qualname__ = (  # names the run that a checkpoint belongs to
            f"TowardsOrder({ranking}, strength={strength}, sparsity={sparsity}, ramp={ramp}, {reader}, part={part}, "
            f"orders={digest:08x})"
        )

    def __call__(self, model: nn.Module, progress: float) -> Tensor:
        """The term of the latest batch."""
        if not isinstance(model, Gated) or model.collected is None:
            return torch.zeros(())
        self.seen = model
        if not self.strength and not self.sparsity:
            return torch.zeros(())  # it only shows the network to whoever measures agreement
        begin, end = self.part
        whole = begin + (end - begin) * progress
        strength = self.strength * (min(1.0, whole / self.ramp) if self.ramp else 1.0)
        total: Tensor | None = None
        for group, (scores, attention) in self.reader.read(model.collected).items():
            if group in self.targets:
                term = self._term(group, scores, attention, strength)
                total = term if total is None else total + term
        return torch.zeros(()) if total is None else total / len(self.targets)

    def forget(self) -> None:
        """Hold the network no longer."""
        self.seen = None

    def _term(self, group: str, scores: Tensor, attention: Tensor, strength: float) -> Tensor:
        target = self.targets[group]
        if target.order.device != scores.device:  # once a run; an index on the CPU would wait for the GPU in every step
            target = self.targets[group] = _Target(target.order.to(scores.device), target.kept)
        term = self._ranked(scores, target, strength)
        if self.sparsity and target.kept < len(target.order):
            tail = attention.index_select(1, target.order[target.kept :]).mean()
            term = term + self.sparsity * tail
        return term

    def _ranked(self, scores: Tensor, target: _Target, strength: float) -> Tensor:
        """``strength · LTR`` of one group; zero where it is switched off altogether."""
        if not self.strength:
            return scores.sum() * 0
        return strength * self.ranking(scores, target.order, target.kept)
