"""GlobalPru from a trained network to a plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import AttrimWarning, InputError
from attrim.methods.gate_training import GateRun, attention_note, check_data, first_batch, gate_notes, read_once
from attrim.methods.globalpru.diary import Diary
from attrim.methods.globalpru.losses import Form
from attrim.methods.globalpru.options import Attention, End, GlobalPruOptions
from attrim.methods.globalpru.run import Work
from attrim.methods.globalpru.scores import Alloc, Ranked, attention_scores, place_scores, plan_of_orders
from attrim.methods.globalpru.vote import Ballot
from attrim.methods.outcome import MethodOutcome
from attrim.methods.ratio import check_reach, check_size
from attrim.modules.batches import device_of
from attrim.modules.gates import Gates
from attrim.modules.gates.places import Point, Policy
from attrim.recover.engine import Engine, make_engine
from attrim.recover.randomness import own_randomness
from attrim.recover.recipe import Loss, Optimizer

__all__ = ["globalpru"]


def globalpru(
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
    alloc: Alloc = "uniform",
    vote: Ballot = "pairwise",
    revote_every: int = 0,
    attention: Attention = "se",
    policy: Policy = "internal",
    tap: Point = "post",
    shared: bool = False,
    hidden: int | None = None,
    ranked: Ranked | None = None,
    form: Form = "pairwise",
    strength: float | None = None,
    omega: float = 4.0,
    temperature: float | None = None,
    margin: float = 0.5,
    pairs: int = 4096,
    ramp: float = 0.3,
    sparsity: float = 1e-3,
    warmup_epochs: int = 5,
    warmup_lr: float = 0.01,
    epochs: int = 20,
    lr: float = 0.02,
    optimizer: Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    samples: int | None = None,
    monitor: int = 256,
    end: End = "fold",
) -> MethodOutcome:
    """Bring all samples to one order of the channels, then cut the end of it.

    Gates and a copy of the network warm up together; a majority vote over the samples gives one order of each group's
    channels; sparse training presses every sample's scores towards it; the gates are folded; the last channels go.

    Certain from the paper: vote, then sparse training with a learn-to-rank regularisation, one static network. Gates, ballot,
    loss, allocation and all numbers are our reading (``docs/methods/globalpru.md``).

    Args:
        model, channels, batches, budget: as for :func:`attrim.methods.pcas.pcas`. Groups that cannot be gated, or not
            folded, stay whole (``outcome.gates.refused``). ``holdout`` is also judged with masks.
        others: see :class:`GlobalPruOptions` and :class:`attrim.methods.gate_training.GateRun`.

    Returns:
        The plan, the trained network to cut, scores (places in the orders), gates; ``statistics``: ``orders``, ``kept``,
        ``attention``, ``epochs``, and ``network``, before folding.

    Raises:
        As for PCAS.

    Source:
        Wang et al., "Towards performance-maximizing neural network pruning via global channel attention", Neural Networks
        171:104-113, 2024.

    Example:
        >>> outcome = globalpru(model, channels, loader, budget=attrim.Budget(macs=0.5), epochs=10)
    """
    given = locals()
    options = GlobalPruOptions(**{f.name: given[f.name] for f in fields(GlobalPruOptions)})
    run = GateRun(**{f.name: given[f.name] for f in fields(GateRun)})
    return _Method(model, channels, options, run, budget)(check_data("globalpru", batches))


class _Method:
    """One call."""

    def __init__(
        self, model: nn.Module, channels: ChannelMap, options: GlobalPruOptions, run: GateRun, budget: Budget | None
    ) -> None:
        self.model, self.channels, self.options, self.run, self.budget = model, channels, options, run, budget
        options.check()
        check_size(budget, options.ratio)

    def __call__(self, data: Iterable[Any]) -> MethodOutcome:
        engine = make_engine(device_of(self.model), "no")  # several processes meet before one writes
        with ExitStack() as stack:
            stack.callback(engine.close)
            stack.enter_context(own_randomness(self.run.seed, device_of(self.model)))  # the caller's states stay
            return self._run(data, engine)

    def _run(self, data: Iterable[Any], engine: Engine) -> MethodOutcome:
        options = self.options
        size = None if self.budget is None else asdict(self.budget)
        stages = self.run.stages("globalpru", self.model, {**options.identity(), "budget": size})
        gates = self._gates(first_batch(data))
        check_reach(self.channels, gates.places, self._plan)
        engine.gather(0)  # every process has looked into the folder before one of them writes there
        stages.begin()
        work = Work(options, self.run, stages, data, self._plan_of)
        result = work.train(self.model, gates, self._expected(gates))
        base, gates = result.gated.base, result.gated.gates
        with own_randomness(self.run.seed, device_of(base)):
            statistics = read_once(stages, base, gates, data, options.samples)
        network = base if options.end == "drop" else gates.fold(base, statistics.factors())
        scores = self._scores(result.orders, {g: m.float() for g, m in statistics.score().items()})
        found = {
            "attention": statistics,
            "orders": result.orders,
            "kept": result.kept,
            "epochs": tuple(work.diary.entries.values()),
            "network": base,
        }
        log = (*gate_notes(gates, ()), *_lines(work.diary), attention_note(statistics))
        return MethodOutcome(result.plan, network, scores, log, gates, found)

    def _scores(self, orders: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> Scores:
        values = place_scores(orders) if self.options.alloc == "uniform" else attention_scores(orders, mean)
        return Scores(values, "globalpru")

    def _plan_of(self, orders: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> PruningPlan:
        return self._plan(self._scores(orders, mean))

    def _plan(self, scores: Scores) -> PruningPlan:
        return plan_of_orders(self.channels, scores, self.options.alloc, self.budget, self.options.ratio)

    def _expected(self, gates: Gates) -> dict[str, int]:
        """How many channels stay if every group keeps the same fraction."""
        orders = {group: torch.arange(self.channels[group].size) for group in gates.places}
        scores = Scores(place_scores(orders), "expected")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttrimWarning)  # of a plan that nobody gets
            plan = plan_of_orders(self.channels, scores, "uniform", self.budget, self.options.ratio)
        return {group: int(plan.groups[group]["kept"]) for group in gates.places}

    def _gates(self, example: Any) -> Gates:
        """On every group that can be gated and, where the gates are to be folded, folded."""
        gates = self._made(example, None)
        if self.options.end == "drop":
            return gates
        ones = {group: torch.ones(self.channels[group].size) for group in gates.places}
        refused: dict[str, str] = {}
        try:
            gates.fold(self.model, ones)
        except InputError:
            for group, one in ones.items():
                try:
                    gates.fold(self.model, {group: one})
                except InputError as error:
                    refused[group] = str(error)
        if not refused:
            return gates
        if len(refused) == len(ones):
            raise InputError(
                f"no group's gates can be folded: {next(iter(refused.values()))} Or pass end='drop', and let recovery make "
                "up for the gates that go."
            )
        known = gates.refused
        gates = self._made(example, [group for group in ones if group not in refused])
        gates.refused.update({**known, **refused})
        return gates

    def _made(self, example: Any, groups: list[str] | None) -> Gates:
        o = self.options
        return Gates(
            self.model,
            self.channels,
            o.attention,
            groups=groups,
            policy=o.policy,
            shared=o.shared,
            point=o.tap,
            hidden=o.hidden,
            seed=self.run.seed,
            example=example,
        )


def _lines(diary: Diary) -> list[Mapping[str, Any]]:
    """For the log: every epoch, every vote, and what agreement there was."""
    steps = {"vote": "vote", "end": "agreement"}
    return [
        {"step": steps.get(str(entry["stage"]).partition("-")[0], "gate training"), **entry}
        for entry in diary.entries.values()
    ]
