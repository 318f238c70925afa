"""The vote as a stage: one pass over the data counts the votes of every group; orders, mean attention, dead channels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import AttrimWarning
from attrim.methods.attention import read_attention
from attrim.methods.globalpru.options import GlobalPruOptions
from attrim.methods.globalpru.vote import Votes
from attrim.methods.stages import Stages
from attrim.modules.distributed import share, world
from attrim.modules.gates import Gates
from attrim.score.data import forward, stream, undisturbed

__all__ = ["Outcome", "collect_votes", "hold_vote"]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a vote gave.

    Attributes:
        orders: group -> ``(C,)`` int64, the most important channel first.
        mean: group -> ``(C,)`` mean attention, zero where a channel is dead.
        votes: group -> what was counted.
    """

    orders: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    votes: Mapping[str, Votes]


def collect_votes(
    model: nn.Module,
    gates: Gates,
    votes: Mapping[str, Votes],
    batches: Iterable[Any],
    options: GlobalPruOptions,
) -> None:
    """Let every sample vote, in eval mode, without gradients; under ``torch.distributed`` each process its share.

    Args:
        model, gates: what samples are looked at with.
        votes: group -> votes, added to.
        batches: this process's samples, without augmentation.
        options: what is ranked, and how many samples vote.
    """
    own = None if options.samples is None else -(-options.samples // world())
    with undisturbed(model), torch.no_grad(), gates.attached(model, inplace=True) as collected:
        for batch in stream(model, batches, "votes", samples=own):
            forward(model, batch)
            for group, (scores, attention) in options.reader.read(collected).items():
                votes[group].add(scores, attention)
    for ballot in votes.values():
        ballot.sum_over_processes()


def hold_vote(
    model: nn.Module,
    gates: Gates,
    batches: Iterable[Any],
    options: GlobalPruOptions,
    stages: Stages,
    number: int,
    kept: Mapping[str, int],
    seed: int,
    before: Outcome | None,
) -> Outcome:
    """Hold a vote, or read what the finished stage ``vote-NUMBER`` has left.

    Args:
        model, gates, batches: who votes.
        options: how.
        stages: where the result is kept.
        number: counted from 0.
        kept: group -> channels that stay, for ``vote="topk"``.
        seed: of ``vote="random"``.
        before: the vote before; it weighs half.
    """
    votes = {
        g: Votes(options.vote, len(p[0].index), kept[g], seed + i) for i, (g, p) in enumerate(gates.places.items())
    }
    name = f"vote-{number}"
    if stages.has(name):
        return _read(stages.read(name), votes)
    collect_votes(model, gates, votes, _own(batches), options)
    _warn_of_draws(votes)
    if before is not None:
        for group, ballot in votes.items():
            ballot.recall(before.votes[group])
    samples = None if options.samples is None else -(-options.samples // world())
    statistics = read_attention(model, gates, _own(batches), samples=samples, name="attention")
    alive = {group: found.any(0) for group, found in statistics.alive.items()}
    outcome = Outcome(
        {group: ballot.order(alive[group]) for group, ballot in votes.items()},
        {group: mean.float() for group, mean in statistics.score().items()},
        votes,
    )
    stages.write(name, _tensors(outcome, tables=bool(options.revote_every)))
    return outcome


def _own(batches: Iterable[Any]) -> Iterable[Any]:
    return share(batches) if world() > 1 else batches


def _warn_of_draws(votes: Mapping[str, Votes]) -> None:
    silent = [g for g, v in votes.items() if v.ballot != "random" and v.size > 1 and not bool(v.spoken)]
    if silent:
        warnings.warn(
            f"every sample scores all channels of {', '.join(map(repr, silent[:3]))} alike, so their order is that of the "
            "indices. Warm the gates up for longer: warmup_epochs=…, warmup_lr=….",
            AttrimWarning,
            stacklevel=4,
        )


def _tensors(outcome: Outcome, tables: bool) -> dict[str, Tensor]:
    kept = {f"order/{g}": order for g, order in outcome.orders.items()}
    kept |= {f"mean/{g}": mean for g, mean in outcome.mean.items()}
    if tables:
        kept |= {f"table/{g}": v.table for g, v in outcome.votes.items()}
    kept |= {f"ranks/{g}": torch.cat([v.ranks, v.ranks.new_tensor([v.samples])]) for g, v in outcome.votes.items()}
    return kept


def _read(tensors: Mapping[str, Tensor], votes: dict[str, Votes]) -> Outcome:
    for group, ballot in votes.items():
        counted = tensors[f"ranks/{group}"]
        ballot.ranks, ballot.samples = counted[:-1], float(counted[-1])
        ballot.table = tensors.get(f"table/{group}", ballot.table)
    return Outcome({g: tensors[f"order/{g}"] for g in votes}, {g: tensors[f"mean/{g}"] for g in votes}, votes)
