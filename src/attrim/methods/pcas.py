"""PCAS: gates are trained on a frozen network; the channels that they attend to least go, by one threshold for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.methods.attention import AttentionStatistics
from attrim.methods.gate_training import (
    GateRun,
    Shaping,
    attention_note,
    begin_together,
    check_data,
    first_batch,
    gate_notes,
    read_once,
    trained_gates,
)
from attrim.methods.outcome import MethodOutcome
from attrim.methods.ratio import check_reach, check_size, plan_within
from attrim.modules.gates import Gates
from attrim.modules.gates.kinds import Kind
from attrim.modules.gates.places import Point, Policy
from attrim.modules.gates.streams import stream_inputs
from attrim.recover.recipe import Loss, Optimizer

__all__ = ["PcasOptions", "pcas"]

Act = Literal["double", "sigmoid", "softmax"]
End = Literal["drop", "fold"]

_KINDS: Mapping[str, Kind] = {"double": "se", "sigmoid": "sigmoid", "softmax": "softmax"}


def pcas(
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
    ratio: float | None = None,
    policy: Policy = "internal",
    act: Act = "double",
    tap: Point = "post",
    shared: bool = False,
    hidden: int | None = None,
    reduction: Literal["mean", "max"] = "mean",
    end: End = "drop",
    epochs: int = 10,
    lr: float = 0.05,
    optimizer: Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    penalty: float = 0.0,
    sharpness: float = 4.0,
    samples: int | None = None,
) -> MethodOutcome:
    """Rank channels by the mean output of attention gates that were trained on the frozen network.

    A gate behind each layer maps the means of its channels to factors of its channels. All gates learn together, by the
    loss of the task; the network learns nothing, and its batch-norm statistics stay. Then one pass over the data gives
    each channel's mean attention, and the channels with the smallest go, by one threshold for the whole network. A channel
    whose activation is always zero has the score 0.

    Certain from the paper: scores are attention statistics, one ratio for the network; from the authors' patent: the base
    is frozen, small values go, the loop of attention, prune and train. The gate's form, the mean as the statistic, the
    ranking rule, the treatment of residual streams and every number are our reading (``docs/methods/pcas.md``). Pruning
    step by step is ``attrim.prune_rounds(..., method="pcas", rounds=3)``.

    Args:
        model: a trained network. Not changed.
        channels: its map.
        batches: training data, with labels unless ``loss`` needs none; gone through several times. The statistics are read
            from them, so they should not be augmented.
        budget: what may be kept; the threshold that just meets it is found by bisection.
        ratio: fraction of the channels that goes, as in the paper, instead of limits in the budget.
        others: see :class:`PcasOptions` and :class:`attrim.methods.gate_training.GateRun`.

    Returns:
        The plan, the network to cut, scores, gates, and ``statistics["attention"]``.

    Raises:
        CriterionError: no data. InputError: a wrong option, or no group that can be gated. BudgetError: as
        :func:`attrim.allocate`. CheckpointError: ``folder`` holds another run.

    Source:
        Yamamoto and Maeno, "PCAS: Pruning Channels with Attention Statistics for Deep Network Compression", BMVC 2019;
        US patent 11468331 of the same authors.

    Example:
        >>> outcome = pcas(model, channels, loader, budget=attrim.Budget(macs=0.5), epochs=2)
        >>> small = attrim.apply(outcome.model_to_cut, outcome.plan)
    """
    given = locals()
    options = PcasOptions(**{f.name: given[f.name] for f in fields(PcasOptions)})
    run = GateRun(**{f.name: given[f.name] for f in fields(GateRun)})
    options.check()
    check_size(budget, ratio)
    data = check_data("pcas", batches)
    if policy == "input_select":
        channels = stream_inputs(model, channels, first_batch(data))
    gates, statistics, log = _attention(model, channels, data, options, run, budget, ratio)
    scores = Scores(statistics.score(reduction), "pcas")
    plan = plan_within(channels, scores, budget, ratio)
    base = model if end == "drop" else gates.fold(model, statistics.factors())
    return MethodOutcome(plan, base, scores, log, gates, {"attention": statistics}, channels=channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class PcasOptions:
    """What PCAS can be told.

    Attributes:
        policy: ``internal`` scores what stays inside residual blocks, ``tied`` residual streams as well, one score a
            stream; ``input_select`` what stays inside and, for every layer that reads a residual stream, which of the
            stream's channels it reads, while the stream keeps its width.
        act: ``double`` (twice the sigmoid, the identity at the beginning), ``sigmoid`` (begins at 0.95) or ``softmax``
            (scaled: the mean attention of each layer is 1).
        tap: where gates hang: ``post`` (behind the activation), ``pre`` (behind the norm), ``conv``.
        shared: one gate for all branches of a stream.
        hidden: width inside a gate; None for ``max(8, size // 16)``.
        reduction: ``mean`` or ``max`` over the branches of a stream.
        end: ``drop`` the gates, or ``fold`` their mean attention into the weights that are then cut.
        epochs, lr, optimizer, momentum, weight_decay: of the training of the gates.
        penalty: weight of the mean attention in the loss.
        sharpness: factor of the logits under the softmax at the end of the training; it begins at 1.
        samples: read the statistics from so many samples; None reads all.
    """

    policy: Policy
    act: Act
    tap: Point
    shared: bool
    hidden: int | None
    reduction: Literal["mean", "max"]
    end: End
    epochs: int
    lr: float
    optimizer: Optimizer
    momentum: float
    weight_decay: float
    penalty: float
    sharpness: float
    samples: int | None

    def check(self) -> None:
        """Refuse what is out of its range.

        Raises:
            InputError: the option is named, with what was expected and found.
        """
        for name, known in (("act", get_args(Act)), ("end", get_args(End)), ("reduction", ("mean", "max"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}.")
        for name in ("penalty", "sharpness"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
                raise InputError(f"{name}: expected a number >= 0, found {number!r}.")

    def identity(self) -> dict[str, Any]:
        """What gates and statistics depend on; ``reduction`` and ``end`` come after them."""
        return {k: v for k, v in asdict(self).items() if k not in ("reduction", "end")}


def _attention(
    model: nn.Module,
    channels: ChannelMap,
    data: Iterable[Any],
    options: PcasOptions,
    run: GateRun,
    budget: Budget | None,
    ratio: float | None,
) -> tuple[Gates, AttentionStatistics, tuple[Mapping[str, Any], ...]]:
    """Trained gates, what they say about the data, and the log."""
    stages = run.stages("pcas", model, options.identity())
    gates = Gates(
        model,
        channels,
        _KINDS[options.act],
        policy=options.policy,
        shared=options.shared,
        point=options.tap,
        hidden=options.hidden,
        seed=run.seed,
        example=first_batch(data),
    )
    check_reach(channels, gates.places, lambda scores: plan_within(channels, scores, budget, ratio))
    if options.end == "fold":  # what cannot be folded is known before the training
        gates.fold(model, {id: torch.ones(channels[id].size) for id in gates.places})
    begin_together(stages, model)
    shaped = options.penalty or options.act == "softmax"
    training = {name: getattr(options, name) for name in ("epochs", "lr", "optimizer", "momentum", "weight_decay")}
    _, gates, reports = trained_gates(
        model,
        gates,
        data,
        stages,
        run,
        frozen=True,
        regularizer=Shaping(options.penalty, options.sharpness) if shaped else None,
        description="training gates",
        **training,
    )
    statistics = read_once(stages, model, gates, data, options.samples)
    return gates, statistics, (*gate_notes(gates, reports), attention_note(statistics))
