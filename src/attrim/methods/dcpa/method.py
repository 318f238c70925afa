"""DCP-A from a network to a plan: search, derive, and say what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.errors import InputError
from attrim.methods.dcpa.attention import Kind
from attrim.methods.dcpa.objective import CostRule
from attrim.methods.dcpa.options import DcpaOptions, Inherit, Space, Start
from attrim.methods.dcpa.report import candidates as names_of
from attrim.methods.dcpa.report import explain
from attrim.methods.dcpa.sample import Sampling
from attrim.methods.dcpa.searched import search_policy
from attrim.methods.dcpa.stage2 import initialised, reference
from attrim.methods.dcpa.widths import RATIOS, Share
from attrim.methods.gate_training import GateRun, check_data
from attrim.methods.outcome import MethodOutcome
from attrim.modules.gates.places import Policy as Streams
from attrim.recover.recipe import Loss, Optimizer, Precision

__all__ = ["dcpa"]


def dcpa(
    model: nn.Module, channels: ChannelMap, batches: Iterable[Any] | None, *, budget: Budget | None = None,
    loss: Loss | None = None, folder: str | Path | None = None, resume: bool = False, seed: int = 0,
    holdout: Iterable[Any] | None = None, on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    augmented: Iterable[Any] | None = None, policy_data: Iterable[Any] | None = None,
    kind: Kind = "se", space: Space = "width", policy: Streams = "internal", share: Share = "group", drop: bool = True,
    drop_prior: float = 0.02, drop_steady: bool = True, drop_check: bool = True,
    candidates: Sequence[float] = RATIOS, order: str = "l2", sampling: Sampling = "hard",
    cost: CostRule = "abslog", cost_weight: float | None = None, tolerance: float = 0.05, entropy: float = 0.0,
    epochs: int = 15, warmup: float = 0.1, lr: float = 0.02, optimizer: Optimizer = "sgd", momentum: float = 0.9,
    weight_decay: float = 5e-4, lr_warmup: float = 0.0, clip: float | None = None,
    policy_lr: float = 3e-3, policy_decay: float = 1e-3, tau_high: float = 5.0, tau_low: float = 0.1,
    reduction: int = 16, balanced: bool = False, start: Start = "noise", fine: bool = True, weights: Inherit = "search",
    recalibrate: int = 100, precision: Precision = "no", every_minutes: float | None = None,
) -> MethodOutcome:  # fmt: skip
    """Learn by gradient how wide each layer should be, with attention telling the policy about the layers.

    A copy of the network is trained as a supernet: every batch is another choice of widths. In turn, the choice itself
    learns, from the task's loss on the other half of the data and from the distance of the expected cost to the budget.
    Then the likeliest widths, repaired onto the budget, are the plan.

    Certain from the paper: pruning as a differentiable search with Gumbel-softmax sampling, an attention mechanism that
    gives the policy layer information, two-stage training, shortcut blocks that allow pruning of width and depth. Everything
    else is a reconstruction (``docs/methods/dcpa.md``).

    Args:
        model: the network, trained or not. Not changed.
        channels: its map.
        batches: training data with labels (unless ``loss`` needs none); split in two halves.
        budget: what may be kept.
        augmented: batches to learn from, instead of ``batches``.
        policy_data: batches for the policy; all others then teach the weights.
        others: see :class:`attrim.methods.dcpa.DcpaOptions` and :class:`attrim.methods.gate_training.GateRun`.

    Returns:
        The plan; the network to cut, with the weights that ``weights`` names, and what
        recovery aims at; scores (for ``space="width"`` the widths'
        order); ``statistics``: ``searched`` (for other budgets: :meth:`Searched.plan`), ``epochs``,
        ``candidates`` (unit -> names of its candidates), ``derived``, ``attention``.

    Raises:
        CriterionError: no data. InputError: a wrong option. BudgetError: the narrowest network is above the budget.
        CheckpointError: ``folder`` holds another run.

    Source:
        Cheng et al., "Differentiable channel pruning guided via attention mechanism: a novel neural network pruning approach",
        Complex & Intelligent Systems 9, 2023.

    Example:
        >>> outcome = dcpa(model, channels, loader, budget=attrim.Budget(macs=0.5), epochs=15)
        >>> small = attrim.apply(outcome.model_to_cut, outcome.plan)
    """
    given = locals()
    options = DcpaOptions(**{f.name: given[f.name] for f in fields(DcpaOptions)})
    run = GateRun(**{f.name: given[f.name] for f in fields(GateRun)})
    if budget is None:
        raise InputError("how small? Pass budget=attrim.Budget(macs=0.5); that keeps half of the multiply-adds.")
    data = check_data("dcpa", batches)
    searched = search_policy(model, channels, data, budget, options, run, policy_data)
    plan, derived = searched.plan(budget, fine=options.fine)
    source = data if run.augmented is None else run.augmented
    base, aim = model, None
    if options.weights == "search":
        base = searched.network(plan, source, options.recalibrate)
        aim = reference(model, searched.base, source, run.loss, options.recalibrate)
    if options.weights == "scratch":
        base = initialised(model, seed)
    found = {
        "searched": searched,
        "epochs": tuple(searched.reports),
        "candidates": names_of(searched.space),
        "derived": derived,
        "attention": explain(searched.policy),
    }
    return MethodOutcome(plan, base, searched.scores(), searched.log(derived), None, found, aim)
