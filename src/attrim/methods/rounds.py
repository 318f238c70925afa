"""Pruning in rounds: cut a little, recover, look again, cut a little more."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import AttrimWarning, BudgetError, InputError, VerificationError
from attrim.methods.pipeline import Cost, Method, PruneResult, prune
from attrim.methods.round_budget import Floors, Schedule, budget_of_round
from attrim.methods.round_store import RoundStore, identity
from attrim.methods.table import METHODS
from attrim.modules.batches import device_of
from attrim.modules.repair import Repair
from attrim.recover.randomness import own_randomness
from attrim.search.allocate import allocate
from attrim.surgery.cut import apply
from attrim.trace.capture import Analysis, analyse
from attrim.trace.verify import Verification, verify

__all__ = ["prune_rounds"]

Steps = list[Mapping[str, Any]]


def prune_rounds(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    rounds: int = 3,
    schedule: Schedule = "geometric",
    method: Method = "l2",
    data: Iterable[Any] | None = None,
    recover: Any = None,
    holdout: Iterable[Any] | None = None,
    training: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    on_round: Callable[[int, PruneResult], None] | None = None,
    repairs: Mapping[type[nn.Module], Repair] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune ``model`` in several rounds of :func:`attrim.prune`, each on the recovered network of the round before.

    Scores are taken anew in every round, from a network that has got used to the cuts so far. Everything in ``budget``
    refers to the *original*: limits, floors (``min_keep``, ``max_removed``), ``multiple_of`` and ``frozen``. After round
    ``r`` of ``R`` the network keeps ``f^(r/R)`` (geometric: every round takes the same share of what is left) or
    ``1 - (1 - f) r/R`` (linear: the same amount) for each limit ``f``. A round in which nothing is left to cut is left out.

    The cuts of all rounds make one plan for the original, and the proof is taken of it: the original, cut by that plan at
    once, against the masked original. Weights of the result are those that recovery left.

    Args:
        model: a trained network. Never changed.
        example_inputs: as for :func:`attrim.trace`.
        budget: what may be kept in the end.
        rounds: 1 is :func:`attrim.prune`.
        schedule: ``geometric`` or ``linear``.
        method, data, recover, holdout, repairs: as for :func:`attrim.prune`; ``data`` that know ``set_epoch`` begin every
            round at epoch 0.
        training: options of the fine-tuning in each round; its teacher is the original unless another is named.
        folder: each finished round is kept there (``round-1/`` … as :func:`attrim.save` writes them). On shared storage
            when there are several processes.
        resume: go on after the last finished round in ``folder``, to the same result (on the same machine and number of
            threads, with data that begin anew in every pass); begin if there is none.
        seed: of what is random in the rounds; the caller's random states are as before afterwards.
        on_round: called after each round, when it is kept, with its number (from 1) and what it gave.
        options: of the criterion.

    Returns:
        One result: the last network, the plan from the original to it, costs of both, the proof of the whole cut, and
        the steps of all rounds, each with its ``round``.

    Raises:
        BudgetError: the budget cannot be reached; known before the first round.
        InputError: an option out of its range.
        CheckpointError: ``folder`` holds another run, or one that was not asked for.
        VerificationError: a round's plan, or the plan of all rounds, could not be proved.

    Source:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (iterative
        pruning); Renda, Frankle and Carbin, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020.

    Example:
        >>> result = prune_rounds(model, example, budget=attrim.Budget(macs=0.3), rounds=4, data=loader, recover="free")
    """
    _check(rounds, schedule, folder, resume, training)
    analysis = analyse(model, example_inputs)
    channels = analysis.channel_map()
    _reachable(channels, budget)
    settings = {"rounds": rounds, "schedule": schedule, "recover": recover, "training": training, "seed": seed}
    store = RoundStore(folder, identity(model, budget, method=method, options=options, **settings))
    given = {"data": data, "recover": recover, "holdout": holdout, "repairs": repairs}
    if training is not None or recover == "finetune":
        given["training"] = {"teacher": model, **(training or {})}
    run = _Run(model, example_inputs, budget, rounds, schedule, method, options, given, seed)
    network, plan, finished = run.all(store, resume, on_round)
    return _joined(run, analysis, channels, network, plan, finished)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What does not change from round to round."""

    model: nn.Module
    example_inputs: Any
    budget: Budget
    rounds: int
    schedule: Schedule
    method: Method
    options: Mapping[str, Any]
    given: Mapping[str, Any]
    seed: int

    def all(
        self, store: RoundStore, resume: bool, on_round: Callable[[int, PruneResult], None] | None
    ) -> tuple[nn.Module, PruningPlan, list[Steps]]:
        """Every round that is not finished yet: the last network, the plan from the original, the steps."""
        found = store.take_up(self.model, resume)
        network, plan, finished = (self.model, None, []) if found is None else found
        for number in range(len(finished) + 1, self.rounds + 1):
            with own_randomness(self.seed + number, device_of(self.model)):
                result = self.round(network, plan, number)
            steps: Steps = [{"round": number, "step": "left out", "reason": "small enough"}]
            if result is not None:
                steps = [{"round": number, **step} for step in result.steps if number == 1 or step["step"] != "dense"]
                network = result.model
                plan = result.plan if plan is None else plan.then(result.plan)
            store.add(network, cast(PruningPlan, plan), steps)  # the first round is never left out
            if on_round is not None and result is not None:
                on_round(number, result)
            finished = [*finished, steps]
        return network, cast(PruningPlan, plan), finished

    def round(self, network: nn.Module, plan: PruningPlan | None, number: int) -> PruneResult | None:
        """Cut and recover once; None when the network is small enough already."""
        set_epoch = getattr(self.given["data"], "set_epoch", None)
        if callable(set_epoch):
            set_epoch(0)
        if plan is None:
            budget = cast(Budget, budget_of_round(self.budget, None, number, self.rounds, self.schedule))
            return prune(
                network, self.example_inputs, method=self.method, budget=budget, **self.given, **self._seeded(number)
            )
        floors = Floors.after(self.budget, plan)
        ways = floors.ways(self.method)
        if self.options.get("policy") == "input_select":  # scores alone do not say which layers read less
            ways = (False,)
        for lifted in ways:
            relative = budget_of_round(self.budget, plan, number, self.rounds, self.schedule, lifted=lifted)
            if relative is None:
                return None
            try:
                return self._again(network, floors, relative, lifted, number)
            except BudgetError:
                if lifted == ways[-1]:
                    raise
        return None

    def _again(self, network: nn.Module, floors: Floors, budget: Budget, lifted: bool, number: int) -> PruneResult:
        """A round after the first."""
        own = self._seeded(number)
        method: Method = floors.guard(self.method, own) if lifted else self.method
        options = {} if lifted else own
        result = prune(network, self.example_inputs, method=method, budget=budget, **self.given, **options)
        floors.check(result.plan, result.channels)
        return result

    def _seeded(self, number: int) -> Mapping[str, Any]:
        """The options, with the round's own seed where a method or criterion takes one: its gates, its numbers."""
        seeds = isinstance(self.method, str) and (self.method == "random" or self.method in METHODS)
        return {**self.options, "seed": self.seed + number} if seeds else self.options


def _check(rounds: Any, schedule: Any, folder: Any, resume: bool, training: Mapping[str, Any] | None) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InputError(f"rounds: expected an int >= 1, found {rounds!r}.")
    if schedule not in get_args(Schedule):
        raise InputError(f"schedule: expected one of {', '.join(get_args(Schedule))}, found {schedule!r}.")
    if resume and folder is None:
        raise InputError("resume=True goes on from a folder. Pass folder='runs/mine'.")
    own = sorted({"folder", "resume"} & set(training or {}))
    if own:
        raise InputError(
            f"training: {' and '.join(own)} would be shared by all rounds. Pass folder= and resume= to prune_rounds, which "
            "keeps finished rounds."
        )


def _reachable(channels: ChannelMap, budget: Budget) -> None:
    """Raise now what the last round would raise after all the training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttrimWarning)
        allocate(channels, Scores({g.id: torch.arange(g.size) for g in channels}, "rounds"), budget)


def _joined(
    run: _Run,
    analysis: Analysis,
    channels: ChannelMap,
    network: nn.Module,
    plan: PruningPlan,
    finished: list[Steps],
) -> PruneResult:
    """One result, with the proof of the whole cut."""
    asked = {k: v for k, v in dataclasses.asdict(run.budget).items() if v is not None}
    notes = {"budget": {**asked, "frozen": list(run.budget.frozen)}, "rounds": run.rounds, "schedule": run.schedule}
    plan = replace(plan, provenance={**plan.provenance, **notes})
    check: Verification = verify(
        run.model, apply(run.model, plan, repairs=run.given["repairs"]), plan, run.example_inputs, analysis=analysis
    )
    if not check.ok:
        raise VerificationError(
            f"the cuts of all rounds, made at once, do not give the masked original: {check}. Freeze the tensors named here "
            "with Budget(frozen=...), and please report the network."
        )
    p = plan.provenance
    return PruneResult(
        model=network,
        plan=plan,
        before=Cost(p["macs_before"], p["params_before"], p["channels_before"]),
        after=Cost(p["macs_after"], p["params_after"], p["channels_after"]),
        verification=check,
        channels=channels,
        steps=tuple(step for steps in finished for step in steps),
    )
