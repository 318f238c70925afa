"""CPSCA: network and gates of spatial and channel attention learn together; then the gates go, and the least channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import BudgetError, InputError
from attrim.methods.attention import AttentionStatistics
from attrim.methods.gate_training import (
    GateRun,
    attention_note,
    begin_together,
    check_data,
    first_batch,
    gate_notes,
    read_once,
    trained_gates,
)
from attrim.methods.outcome import MethodOutcome
from attrim.methods.ratio import check_reach
from attrim.modules.gates import Gates
from attrim.modules.gates.places import Policy
from attrim.recover.recipe import Loss, Optimizer
from attrim.search.allocate import allocate
from attrim.search.decide import plan_from_kept

__all__ = ["cpsca"]


def cpsca(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any] | None,
    *,
    budget: Budget | None = None,
    loss: Loss | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    holdout: Iterable[Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    augmented: Iterable[Any] | None = None,
    ratios: Mapping[str, float] | None = None,
    policy: Policy = "internal",
    base: Literal["trained", "original"] = "trained",
    epochs: int = 30,
    lr: float = 0.01,
    optimizer: Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    samples: int | None = None,
) -> MethodOutcome:
    """Rank the channels of each layer by the mean of the channel attention that was trained with the network.

    Modules of spatial, then channel attention hang between each convolution and its norm, and learn together with a copy of
    the network. The score of a channel is its mean attention over the data; every layer keeps its highest-scored channels,
    at hand-set ratios or at one common ratio that meets the budget. Then the modules are dropped. Because they stood before
    the norm, the norms' statistics must be measured again after the cut (``recover="free"`` or ``"finetune"``).

    The modules, their place, the ranking within each layer and the dropping are as in the authors' code; that scores are
    the mean over all samples, the common ratio, and a training that begins at a trained network are our reading.

    Args:
        model, channels, batches: as for :func:`attrim.methods.pcas.pcas`; for the others see
            :class:`attrim.methods.gate_training.GateRun`.
        budget: what may be kept; its scope is ``group`` whatever it says: every layer gets the same ratio.
        ratios: glob over group ids -> fraction of the channels that goes, instead of a budget: ``{"layer1.*": 0.6}``; the
            kept count is rounded down. Groups that no glob names stay whole.
        policy: ``internal`` as in the paper, or ``tied``.
        base: cut the network that was trained with the modules, or the original.
        epochs, lr, optimizer, momentum, weight_decay: of the training.
        samples: read the statistics from so many samples; None reads all.

    Returns:
        The plan, the network to cut, scores, gates, and ``statistics["attention"]``.

    Raises:
        CriterionError, InputError, BudgetError, CheckpointError: as for PCAS.

    Source:
        Liu et al., "Channel pruning guided by spatial and channel attention for DNNs in intelligent edge computing",
        Applied Soft Computing 110, 2021, arXiv 2011.03891.

    Example:
        >>> outcome = cpsca(model, channels, loader, ratios={"layer1.*": 0.6, "layer2.*": 0.3, "layer3.*": 0.1})
    """
    given = locals()
    run = GateRun(**{f.name: given[f.name] for f in fields(GateRun)})
    training = {name: given[name] for name in ("epochs", "lr", "optimizer", "momentum", "weight_decay")}
    if base not in ("trained", "original") or policy not in ("internal", "tied"):
        raise InputError(
            f"cpsca: expected base='trained' or 'original' and policy='internal' or 'tied', found {base!r} and {policy!r}."
        )
    if (budget is None) == (ratios is None):
        raise InputError("cpsca: expected either budget=attrim.Budget(macs=0.5) or ratios={'layer1.*': 0.6, ...}.")
    data = check_data("cpsca", batches)
    budget = None if budget is None else dataclasses.replace(budget, scope="group")

    def plan_of(scores: Scores) -> PruningPlan:
        return _by_ratios(channels, scores, ratios or {}) if budget is None else allocate(channels, scores, budget)

    trained, gates, statistics, log = _attention(model, channels, data, run, plan_of, policy, samples, training)
    scores = Scores(statistics.score(), "cpsca")
    plan = plan_of(scores)
    network = trained if base == "trained" else model
    return MethodOutcome(plan, network, scores, log, gates, {"attention": statistics})


def _attention(
    model: nn.Module,
    channels: ChannelMap,
    data: Iterable[Any],
    run: GateRun,
    plan_of: Callable[[Scores], PruningPlan],
    policy: Policy,
    samples: int | None,
    training: Mapping[str, Any],
) -> tuple[nn.Module, Gates, AttentionStatistics, tuple[Mapping[str, Any], ...]]:
    """The network and the gates that were trained together, what they say about the data, and the log."""
    stages = run.stages("cpsca", model, {"policy": policy, "samples": samples, **training})
    gates = Gates(model, channels, "sca", policy=policy, point="conv", seed=run.seed, example=first_batch(data))
    check_reach(channels, gates.places, plan_of)
    begin_together(stages, model)
    trained, gates, reports = trained_gates(
        model,
        gates,
        data,
        stages,
        run,
        frozen=False,
        regularizer=None,
        description="training with attention",
        **training,
    )
    statistics = read_once(stages, trained, gates, data, samples)
    return trained, gates, statistics, (*gate_notes(gates, reports), attention_note(statistics))


def _by_ratios(channels: ChannelMap, scores: Scores, ratios: Mapping[str, float]) -> PruningPlan:
    """Each named group keeps ``int(C (1 - p))`` channels, at least one."""
    kept = {}
    for glob, gone in ratios.items():
        if isinstance(gone, bool) or not isinstance(gone, (int, float)) or not 0 <= gone < 1:
            raise BudgetError(f"ratios: expected fractions of channels that go, in [0, 1), found {glob!r}: {gone!r}.")
        named = [group for group in scores.values if fnmatchcase(group, glob)]
        if not named:
            raise InputError(
                f"ratios: the glob '{glob}' names no scored group. The groups are: {', '.join(list(scores.values)[:8])}, …"
            )
        for group in named:
            value = scores.values[group]
            stays = max(1, int(len(value) * (1 - gone) + 1e-9))
            kept[group] = value.argsort(descending=True, stable=True)[:stays].sort().values.tolist()
    return plan_from_kept(channels, kept, {"criterion": scores.criterion, "ratios": dict(ratios)})
