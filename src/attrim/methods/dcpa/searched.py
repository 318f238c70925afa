"""The search as one call, and its result, from which networks for several budgets are derived."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.methods.dcpa.attention import Kind
from attrim.methods.dcpa.check import checked
from attrim.methods.dcpa.derive import Derived, check_reach, repair
from attrim.methods.dcpa.halves import halves
from attrim.methods.dcpa.judge import Judge
from attrim.methods.dcpa.levels import by_threshold, uniform
from attrim.methods.dcpa.options import DcpaOptions
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.report import attention, candidates
from attrim.methods.dcpa.search import Data, Search, SearchNet
from attrim.methods.dcpa.stage2 import remeasured
from attrim.methods.dcpa.supernet import Supernet
from attrim.methods.dcpa.watch import Watched
from attrim.methods.dcpa.widths import SearchSpace, make_space
from attrim.methods.gate_training import GateRun, check_data, first_batch
from attrim.methods.stages import Stages
from attrim.modules.batches import device_of, read_batch, run_batch
from attrim.modules.gates.places import Plot, find_places
from attrim.recover.checkpoint import Checkpoints
from attrim.recover.engine import Engine, make_engine
from attrim.recover.evaluate import restore_modes
from attrim.recover.keeper import fill_tensors, tensors_of
from attrim.recover.metrics import METRICS_FILE
from attrim.recover.randomness import own_randomness
from attrim.recover.recipe import Recipe
from attrim.score.api import score
from attrim.search.decide import plan_from_kept
from attrim.search.limits import limits_of

__all__ = ["Searched", "search_policy"]


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """A finished search: several budgets can be derived from it.

    Attributes:
        base: the network with the weights that the search has trained.
        policy: what was learned.
        ranked: group -> channels, the one that is kept longest first.
        refused: group -> why it was not searched.
        reports: figures of every epoch.
        kind: of the policy.
        judge: tells whether branches had better stay; None takes the policy at its word.
    """

    base: nn.Module
    policy: Policy
    ranked: Mapping[str, Tensor]
    refused: Mapping[str, str]
    reports: Sequence[Mapping[str, Any]]
    kind: Kind
    judge: Judge | None = None

    @property
    def space(self) -> SearchSpace:
        """What was searched."""
        return self.policy.space

    def derive(self, budget: Budget, *, fine: bool = True, stay: Sequence[str] = ()) -> Derived:
        """The network of a budget by the policy alone; see :func:`attrim.methods.dcpa.derive.repair`."""
        limits = limits_of(self.space.channels.cost, budget)
        if self.kind == "uniform":
            return uniform(self.space, limits)
        with torch.no_grad():
            log_p = self.policy.log_probabilities()
            if self.space.gated:
                return by_threshold(self.space, limits, self.scores().values, _keep(log_p), stay)
            return repair(self.space, Prices(self.space, limits), log_p, limits, fine=fine, stay=stay)

    def plan(self, budget: Budget, *, fine: bool = True) -> tuple[PruningPlan, Derived]:
        """The plan of a budget, which may be another than that of the search, and how it was derived.

        Branches that the policy drops are judged on held-out data first, where there is a ``judge``; see
        :func:`attrim.methods.dcpa.check.checked`.

        Example:
            >>> for share in (0.3, 0.5, 0.7):
            ...     plan, _ = searched.plan(attrim.Budget(macs=share))
        """
        if self.judge is None:
            return self._proposal(budget, fine, ())
        with torch.no_grad():
            keep = _keep(self.policy.log_probabilities()).tolist()
        found = sorted((odds, unit.branch) for odds, unit in zip(keep, self.space.units, strict=True) if unit.branch)
        branches = [branch for _, branch in reversed(found)]
        return checked(partial(self._proposal, budget, fine), branches, self.judge, budget, fine)

    def _proposal(self, budget: Budget, fine: bool, stay: Sequence[str]) -> tuple[PruningPlan, Derived]:
        derived = self.derive(budget, fine=fine, stay=stay)
        ranked = self.ranked
        if self.space.gated:
            ranked = {g: v.argsort(descending=True, stable=True) for g, v in self.scores().values.items()}
        kept = {g: ranked[g][:width].tolist() for g, width in derived.kept.items()}
        notes = {"criterion": "dcpa", "kind": self.kind, "branches": list(derived.drops)}
        return plan_from_kept(self.space.channels, kept, notes, drops=derived.drops), derived

    def network(self, plan: PruningPlan, batches: Iterable[Any], limit: int = 100) -> nn.Module:
        """The trained network with batch-norm statistics measured for a plan; cut it with :func:`attrim.apply`."""
        draw = self.policy.chosen(_kept_channels(self.space, plan), tuple(plan.provenance.get("branches", ())))
        return remeasured(self.base, Supernet(self.base, self.space), draw, batches, limit)

    def scores(self) -> Scores:
        """What ranks channels: logits of single channels, or places in the order of each group, in (0, 1]."""
        space = self.space
        if space.gated:
            logits = self.policy.channel_logits().detach().cpu()
            offsets = {g: space.offsets[g] - (space.size - len(logits)) for g in space.gated}
            return Scores({g: logits[o : o + space.channels[g].size] for g, o in offsets.items()}, "dcpa")
        values = {}
        for group, order in self.ranked.items():
            place = torch.empty(len(order))
            place[order] = 1 - torch.arange(len(order)) / len(order)
            values[group] = place
        return Scores(values, "dcpa")

    def log(self, derived: Derived) -> tuple[Mapping[str, Any], ...]:
        """Lines for the log of the run."""
        space = self.space
        begin: dict[str, Any] = {
            "step": "search space", "groups": len(space.groups), "units": len(space.units), "kind": self.kind,
            "parameters": sum(p.numel() for p in self.policy.parameters()),
        }  # fmt: skip
        begin["candidates"] = candidates(space)
        begin |= {"refused": dict(self.refused)} if self.refused else {}
        end = {
            "step": "derived", "repairs": derived.moved, "slack": derived.slack, "widths": dict(derived.kept),
            "drops": list(derived.drops), **attention(self.policy),
        }  # fmt: skip
        end |= {} if derived.check is None else {"check": dict(derived.check)}
        return (begin, *({"step": "search", **report} for report in self.reports), end)


def search_policy(
    model: nn.Module,
    channels: ChannelMap,
    data: Iterable[Any],
    budget: Budget,
    options: DcpaOptions,
    run: GateRun,
    policy_data: Iterable[Any] | None = None,
) -> Searched:
    """Stage 1 alone. Arguments as for :func:`dcpa`.

    Example:
        >>> searched = search_policy(model, channels, loader, budget, DcpaOptions(kind="free"), GateRun(...))
    """
    options.check()
    engine = make_engine(device_of(model), options.precision)
    with ExitStack() as stack:
        stack.callback(engine.close)
        stages = run.stages("dcpa", model, {**options.identity(), "budget": asdict(budget)})
        net, ranked, plot = _begin(model, channels, data, budget, options, run.seed)
        engine.gather(0)  # every process has looked into the folder before one of them writes there
        stages.begin()
        reports: list[dict[str, Any]] = []
        parts = _parts(data, run, policy_data) if options.epochs else None
        if stages.has("search"):
            fill_tensors(net, stages.read("search"))
            reports = _reports(stages)
            for report in reports if run.on_epoch is not None and engine.main else ():
                run.on_epoch(report)  # type: ignore[misc]
        elif parts is not None:
            reports = _learn(net, plot, parts, options, run, stages, engine)
            stages.write("search", tensors_of(net))
            if stages.path("searching") is not None and engine.main:
                Checkpoints(stages.path("searching") or "").remove()
    judge: Judge | None = None
    if parts is not None and options.drop_check and net.policy.learns:
        base, source = (
            model if options.weights == "given" else net.base,
            data if run.augmented is None else run.augmented,
        )
        judge = Judge(base, source, parts[1], run.loss, options.recalibrate, run.seed, stages.path("drops.json"))
    return Searched(net.base, net.policy, ranked, plot.refused, reports, options.kind, judge)


def _parts(data: Iterable[Any], run: GateRun, policy_data: Iterable[Any] | None) -> tuple[Iterable[Any], Iterable[Any]]:
    """What teaches the weights, and what teaches the policy."""
    source = data if run.augmented is None else run.augmented
    return halves(source, run.seed) if policy_data is None else (source, check_data("dcpa", policy_data))


def _keep(log_probabilities: Tensor) -> Tensor:
    """Log-odds of keeping each unit's branch."""
    if log_probabilities.shape[1] < 2:
        return log_probabilities.sum(1)
    return log_probabilities[:, 1:].logsumexp(1) - log_probabilities[:, 0]


def _begin(
    model: nn.Module, channels: ChannelMap, data: Iterable[Any], budget: Budget, options: DcpaOptions, seed: int
) -> tuple[SearchNet, dict[str, Tensor], Plot]:
    """Network and policy as they are before the search, the order of the channels, and where they are seen."""
    plot = _plot(model, channels, data, options)
    by_channel = options.space == "channel"
    space = make_space(
        channels, plot.places, budget, ratios=options.candidates, share=options.share, by_channel=by_channel,
        drop=options.drop,
    )  # fmt: skip
    limits = limits_of(channels.cost, budget)
    check_reach(space, limits, budget)
    ranked = _ranked(model, space, options.order, data)
    ranks = torch.cat([order.argsort() for order in ranked.values()])
    policy = Policy(
        space,
        Prices(space, limits),
        ranks,
        options.kind,
        reduction=options.reduction,
        balanced=options.balanced,
        start=options.start,
        drop_prior=options.drop_prior,
        drop_steady=options.drop_steady,
        seed=seed,
    )
    return SearchNet(copy.deepcopy(model), policy.to(device_of(model))), ranked, plot


def _reports(stages: Stages) -> list[dict[str, Any]]:
    """The figures that a finished search has left beside its checkpoints."""
    path = stages.path("searching")
    file = None if path is None else path / METRICS_FILE
    if file is None or not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _learn(
    net: SearchNet, plot: Plot, parts: tuple[Iterable[Any], Iterable[Any]], options: DcpaOptions, run: GateRun,
    stages: Stages, engine: Engine,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train network and policy in place; returns the figures of every epoch."""
    folder = stages.path("searching")
    recipe = Recipe(
        epochs=max(1, options.epochs), lr=options.lr, optimizer=options.optimizer, momentum=options.momentum,
        weight_decay=options.weight_decay, warmup=options.lr_warmup, clip=options.clip, precision=options.precision,
        loss=run.loss, seed=run.seed, folder=folder, resume=folder is not None, every_minutes=options.every_minutes,
    )  # fmt: skip
    recipe.check(None)
    home = device_of(net.base)
    modes = [(module, module.training) for module in net.base.modules()]
    with own_randomness((run.seed + 7919 * engine.rank) % 2**63, engine.device):
        net.to(engine.device).train()
        net.policy.prices.to(engine.device)
        watched = Watched(plot.places, net.policy.space)
        reports = Search(
            net, watched, Data(*parts, run.holdout), options, recipe, engine, stages.identity, run.on_epoch
        ).run()
    net.to(home)
    net.policy.prices.to(home)
    restore_modes(modes)
    return reports


def _plot(model: nn.Module, channels: ChannelMap, data: Iterable[Any], options: DcpaOptions) -> Plot:
    """Which groups can be searched, and where each can be seen, from one watched pass."""
    batch = read_batch(first_batch(data), device_of(model))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            plot = find_places(
                model, channels, point="post", groups=None, policy=options.policy, run=lambda: run_batch(model, batch)
            )
    finally:
        restore_modes(modes)
    if not plot.places:
        reasons = "; ".join(f"'{g}': {why}" for g, why in list(plot.refused.items())[:3]) or "the map has no groups"
        raise InputError(f"no group can be searched: {reasons}.")
    return plot


def _ranked(model: nn.Module, space: SearchSpace, order: str, data: Iterable[Any]) -> dict[str, Tensor]:
    """Channels of each searched group, the one that is kept longest first."""
    if order == "prefix" or space.gated:
        return {g: torch.arange(space.channels[g].size) for g in space.groups}
    values = score(model, space.channels, order, data, missing="skip").values
    return {
        g: values[g].argsort(descending=True, stable=True) if g in values else torch.arange(space.channels[g].size)
        for g in space.groups
    }


def _kept_channels(space: SearchSpace, plan: PruningPlan) -> dict[str, Tensor]:
    """Group -> kept channels, read back from the cuts; tensors that go with a branch are not cut."""
    found = {}
    for name in space.groups:
        for member in space.channels[name].members:
            cut = plan.cuts.get(member.axis.tensor)
            if cut is not None and member.axis.dim in cut.keep:
                kept = torch.tensor(cut.keep[member.axis.dim])
                found[name] = torch.isin(torch.from_numpy(member.index[:, 0].copy()), kept).nonzero().flatten()
                break
    return found
