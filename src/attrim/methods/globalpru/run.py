"""The stages of a run: warm-up, vote, sparse training, each finished once and read again by a run that goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from attrim.core.plan import PruningPlan
from attrim.methods.gate_training import GateRun
from attrim.methods.globalpru.ballots import Outcome, hold_vote
from attrim.methods.globalpru.diary import Diary
from attrim.methods.globalpru.masks import measure_masks
from attrim.methods.globalpru.monitor import measure_agreement
from attrim.methods.globalpru.objective import TowardsOrder
from attrim.methods.globalpru.options import GlobalPruOptions
from attrim.methods.stages import Stages
from attrim.modules.batches import device_of, read_batch
from attrim.modules.distributed import rank
from attrim.modules.gates import Gated, Gates
from attrim.modules.names import named_tensors
from attrim.recover.checkpoint import Checkpoints
from attrim.recover.finetune import finetune
from attrim.recover.randomness import own_randomness

__all__ = ["Ordered", "Work"]

PlanOf = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], PruningPlan]
"""Orders and mean attention to a plan."""


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """The network at the end of the training, and the order that it keeps.

    Attributes:
        gated: network and gates.
        orders: group -> ``(C,)``, the most important channel first.
        kept: group -> how many stay.
        plan: the cut.
    """

    gated: Gated
    orders: Mapping[str, Tensor]
    kept: Mapping[str, int]
    plan: PruningPlan


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A vote, and what follows from it."""

    vote: Outcome
    kept: Mapping[str, int]
    plan: PruningPlan


class Work:
    """One run.

    Args:
        options: of the method.
        run: loss, seed, folder and what is reported.
        stages: where finished stages lie.
        batches: without augmentation; votes are held and agreement is measured on them.
        plan_of: says how many channels stay, from orders and mean attention.

    Attributes:
        diary: figures of every epoch.
    """

    def __init__(
        self, options: GlobalPruOptions, run: GateRun, stages: Stages, batches: Iterable[Any], plan_of: PlanOf
    ) -> None:
        self.options, self.run, self.stages, self.batches, self.plan_of = options, run, stages, batches, plan_of
        self.diary = Diary(stages.path("epochs.json"))
        self.watched: list[Any] | None = None

    def train(self, model: nn.Module, gates: Gates, kept: Mapping[str, int]) -> Ordered:
        """Warm up, vote, and train towards the order, with further votes where they are asked for.

        Args:
            model: not changed.
            gates: made for it.
            kept: group -> channels that will stay, as far as it is known before the vote.
        """
        gated = self._warmed(Gated(copy.deepcopy(model), gates, frozen=False))
        held = self._vote(gated, 0, kept, None, 0)
        done = 0
        for number, epochs in enumerate(self.options.parts):
            if number:
                held = self._vote(gated, number, held.kept, held.vote, done)
            gated = self._sparse(gated, held, number, done, epochs)
            done += epochs
        if done:
            self._look("end", gated, held, done, masks=True)
        return Ordered(gated, held.vote.orders, held.kept, held.plan)

    def _vote(self, gated: Gated, number: int, kept: Mapping[str, int], before: Outcome | None, done: int) -> _Held:
        seed = self.run.seed
        with own_randomness(seed + number, device_of(gated)):  # a source that shuffles gives a resumed run the same
            vote = hold_vote(
                gated.base, gated.gates, self.batches, self.options, self.stages, number, kept, seed, before
            )
        plan = self.plan_of(vote.orders, vote.mean)
        held = _Held(vote, {group: int(plan.groups[group]["kept"]) for group in vote.orders}, plan)
        self._look(f"vote-{number}", gated, held, done, masks=number == 0)
        return held

    def _warmed(self, gated: Gated) -> Gated:
        options = self.options
        return self._stage("warm-up", gated, self.run.seed, 0, None, epochs=options.warmup_epochs, lr=options.warmup_lr)

    def _sparse(self, gated: Gated, held: _Held, number: int, done: int, epochs: int) -> Gated:
        options = self.options
        towards = TowardsOrder(
            held.vote.orders,
            held.kept,
            ranking=options.ranking,
            strength=options.weight,
            sparsity=options.sparsity,
            ramp=options.ramp,
            reader=options.reader,
            part=(done / options.epochs, (done + epochs) / options.epochs),
        )
        rate: dict[str, Any] = {"epochs": epochs, "lr": options.lr}
        rate["schedule"] = "cosine" if done + epochs == options.epochs else "constant"
        rate |= {"warmup": 0.0} if number else {}
        first = options.warmup_epochs + done
        return self._stage(f"sparse-{number}", gated, self.run.seed + number + 1, first, towards, **rate)

    def _stage(
        self, name: str, gated: Gated, seed: int, first: int, towards: TowardsOrder | None, **training: Any
    ) -> Gated:
        """Train a copy of ``gated``, or read what a finished stage has left; ``first`` epochs came before."""
        if self.stages.has(name):
            _fill(gated, self.stages.read(name))
            for entry in self.diary.of_stage(name):
                self._tell(entry)
            return gated

        def note(report: Mapping[str, Any]) -> None:
            epoch = first + int(report["epoch"])
            self._tell(self.diary.once(f"epoch {epoch}", lambda: self._entry(name, epoch, report, towards)))

        folder = self.stages.path(name)
        trained = finetune(
            gated,
            self.batches if self.run.augmented is None else self.run.augmented,
            loss=self.run.loss,
            regularizer=towards,
            holdout=self.run.holdout,
            seed=seed,
            folder=folder,
            resume=folder is not None,
            on_epoch=note,
            description=name.partition("-")[0] + " training" if towards is not None else "warming up gates",
            **self.options.training,
            **training,
        )
        if towards is not None:
            towards.forget()
        gated = cast(Gated, trained)
        gated.collected = None
        tensors = {f"gates.{k}": v for k, v in gated.gates.state_dict().items()}
        tensors |= {f"base.{k}": v for k, v in named_tensors(gated.base).tensors.items()}
        self.stages.write(name, tensors)
        if folder is not None and rank() == 0:
            Checkpoints(folder).remove()
        return gated

    def _tell(self, entry: Mapping[str, Any]) -> None:
        if self.run.on_epoch is not None and rank() == 0:
            self.run.on_epoch(dict(entry))

    def _entry(self, stage: str, epoch: int, report: Mapping[str, Any], towards: TowardsOrder | None) -> dict[str, Any]:
        found = {**report, "stage": stage, "epoch": epoch}
        if towards is not None and towards.seen is not None:
            orders = {group: target.order.cpu() for group, target in towards.targets.items()}
            kept = {group: target.kept for group, target in towards.targets.items()}
            found |= self._agreement(towards.seen, orders, kept)
        return found

    def _look(self, key: str, gated: Gated, held: _Held, done: int, masks: bool) -> None:
        """Agreement between two trainings, and accuracies with masks where there are labelled batches."""
        if rank() != 0:
            return

        def entry() -> dict[str, Any]:
            found: dict[str, Any] = {"stage": key, "epoch": self.options.warmup_epochs + done}
            orders, kept = held.vote.orders, held.kept
            found |= self._agreement(gated, orders, kept)
            if masks and self.run.holdout is not None:
                measured = measure_masks(
                    gated.base, gated.gates, orders, kept, self.run.holdout, reader=self.options.reader
                )
                found["masks"] = {**asdict(measured), "gap": measured.gap}
            return found

        self.diary.once(key, entry)

    def _agreement(self, gated: Gated, orders: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Any]:
        if not self.options.monitor:
            return {}
        if self.watched is None:
            with own_randomness(self.run.seed, device_of(gated)):  # training draws from the same generators
                self.watched = _first_samples(self.batches, self.options.monitor)
        reader, some = self.options.reader, self.options.monitor
        groups = measure_agreement(gated.base, gated.gates, orders, kept, self.watched, reader=reader, samples=some)
        names = ("tau", "overlap", "variance")
        means = {n: sum(getattr(g, n) for g in groups.values()) / max(1, len(groups)) for n in names}
        return {**means, "agreement": {group: asdict(found) for group, found in groups.items()}}


def _first_samples(batches: Iterable[Any], samples: int) -> list[Any]:
    """Batches with the first so many samples, held so that every epoch is measured on the same."""
    held, seen = [], 0
    for raw in islice(batches, samples):
        held.append(raw)
        seen += read_batch(raw, torch.device("cpu")).size
        if seen >= samples:
            break
    return held


def _fill(gated: Gated, tensors: Mapping[str, Tensor]) -> None:
    gated.gates.load_state_dict({k.removeprefix("gates."): v for k, v in tensors.items() if k.startswith("gates.")})
    own = named_tensors(gated.base).tensors
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("base."):
                own[name.removeprefix("base.")].copy_(tensor)
