"""Stage 1: weights and policy learn in turn, on two halves of the data; survives being killed at any batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import InputError
from attrim.methods.dcpa.objective import entropy_weight
from attrim.methods.dcpa.options import DcpaOptions
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.report import describe
from attrim.methods.dcpa.sample import Draw, Temperature
from attrim.methods.dcpa.steps import Figures, PolicyStep, WeightStep
from attrim.methods.dcpa.supernet import Supernet
from attrim.methods.dcpa.watch import Watched
from attrim.modules.progress import progress
from attrim.recover.engine import Engine
from attrim.recover.evaluate import count_right
from attrim.recover.feed import Feed, Portion
from attrim.recover.keeper import Keeper, fill_tensors, tensors_of, weights_digest
from attrim.recover.metrics import Log, Tally
from attrim.recover.objective import Objective
from attrim.recover.randomness import random_state, restore_random_state
from attrim.recover.recipe import Recipe
from attrim.recover.schedule import warmup_cosine
from attrim.recover.trainer import make_optimizer

__all__ = ["Data", "Search", "SearchNet"]


class SearchNet(nn.Module):
    """The user's network and the policy, as one module that can be kept."""

    def __init__(self, base: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.base, self.policy = base, policy


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """What a search reads: batches for the weights, for the policy, and to judge with."""

    weights: Iterable[Any]
    policy: Iterable[Any]
    holdout: Iterable[Any] | None = None


class Search:
    """One search.

    Args:
        net: network and policy; both learn in place. On the engine's device.
        watched: reads descriptors.
        data: batches.
        options: of the method.
        recipe: of the weights' training; names folder, seed and precision.
        engine: where it happens.
        identity: what else the result depends on, for checkpoints.

    Attributes:
        reports: figures of every epoch that is done.
    """

    def __init__(
        self, net: SearchNet, watched: Watched, data: Data, options: DcpaOptions, recipe: Recipe, engine: Engine,
        identity: Mapping[str, Any], on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:  # fmt: skip
        self.net, self.data, self.options, self.recipe, self.engine = net, data, options, recipe, engine
        self.watched, self.on_epoch = watched, on_epoch
        feed: dict[str, Any] = {"device": engine.device, "rank": engine.rank, "world": engine.world}
        self.feed = Feed(data.weights, seed=recipe.seed, **feed)
        self.other = Feed(data.policy, seed=recipe.seed + 500_009, **feed)
        self.steps = self.feed.steps
        self.keeper = Keeper(recipe, engine)
        digest = "" if recipe.folder is None else weights_digest(net.base)
        self._identity = {
            **identity, **recipe.identity(), **options.identity(), "batches": [self.steps, self.other.steps],
            "weights of the model": digest,
        }  # fmt: skip
        self.optimizer = make_optimizer(net.base, recipe)
        self.adam = torch.optim.Adam(
            net.policy.parameters(), lr=options.policy_lr, betas=(0.5, 0.999), weight_decay=options.policy_decay
        )
        call, self.stepper = engine.prepare(net.base, self.optimizer)
        supernet, objective = Supernet(net.base, net.policy.space), Objective(recipe, None)
        self.supernet = supernet
        self.learn = WeightStep(net.base, call, supernet, net.policy, watched, objective, engine)
        self.decide = PolicyStep(net.base, supernet, net.policy, objective, options, engine)
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.tally, self.policy_tally = Tally(), Tally()
        self.reports: list[dict[str, Any]] = []
        self.epoch, self.done = 0, 0
        self._began: list[Tensor] | None = None
        self._other_began: list[Tensor] | None = None

    def run(self) -> list[dict[str, Any]]:
        """Search to the end, from the beginning or from a checkpoint; returns the figures of every epoch."""
        folder = None if self.recipe.folder is None or not self.engine.main else Path(self.recipe.folder)
        with ExitStack() as stack:
            state = self.keeper.take_up(lambda: self._identity, self.net)
            if state is not None:
                self._restore(state)
            log = Log(folder, False, self.reports)
            stack.callback(log.close)
            for report in self.reports:
                self._tell(report)
            stack.enter_context(self.watched.reading(self.net.base))
            left = self.steps * (self.options.epochs - self.epoch) - self.done
            policy_portions = self._policy_portions()
            for portion in progress(self._portions(log), "searching widths", left, show=self.engine.main):
                self._batch(portion, policy_portions)
        return self.reports

    @property
    def warm(self) -> bool:
        """Whether only the weights learn in this epoch."""
        return self.epoch < self.options.warm_epochs

    @property
    def _policy_steps(self) -> int:
        """Policy steps that are done."""
        done = self.epoch * self.steps + self.done
        return max(0, done - self.options.warm_epochs * self.steps)

    def _portions(self, log: Log) -> Iterator[Portion]:
        while self.epoch < self.options.epochs:
            began, self._began = self._began, None
            yield from self.feed.epoch(self.epoch, self.done, began)
            self._close_epoch(log)

    def _policy_portions(self) -> Iterator[Portion]:
        """The other half, as often as it takes."""
        epoch, skip = divmod(self._policy_steps, self.other.steps)
        while True:
            began, self._other_began = self._other_began, None
            yield from self.other.epoch(epoch, skip, began)
            epoch, skip = epoch + 1, 0

    def _batch(self, portion: Portion, policy_portions: Iterator[Portion]) -> None:
        begin = time.monotonic()
        options, total = self.options, max(1, self.options.epochs * self.steps)
        done = self.epoch * self.steps + self.done
        tau = Temperature(options.tau_high, options.tau_low)(self.epoch / options.epochs)
        self.optimizer.zero_grad(set_to_none=True)
        draw = self._anything() if self.warm else self._drawn(tau)
        figures = self.learn(portion, draw, done / total)
        self._check(figures.values["loss"], "loss")
        rate = self.recipe.lr * warmup_cosine(done, total, round(self.recipe.warmup * total))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.recipe.clip is not None:
            self.engine.clip(self.net.base.parameters(), self.recipe.clip)
        self.stepper.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.warm:
            self._policy_batch(next(policy_portions), tau, done / total)
        self.done += 1
        _add(self.tally, figures, time.monotonic() - begin)
        if self.done < self.steps and self.engine.total(
            torch.tensor([float(self.keeper.due)], device=self.engine.device)
        ):
            self._save(self.feed.generators)

    def _policy_batch(self, portion: Portion, tau: float, done: float) -> None:
        draw = self.net.policy.sample(tau, self.random, self.options.sampling)
        figures = self.decide(portion, draw, entropy_weight(self.options.entropy, done), done)
        self._check(figures.values["loss"], "loss of the policy")
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        _add(self.policy_tally, figures, 0.0)

    @torch.no_grad()
    def _drawn(self, tau: float) -> Draw:
        """A network for the weights to learn with."""
        draw = self.net.policy.sample(tau, self.random, self.options.sampling)
        return self.net.policy.steady(draw) if self.options.drop_steady else draw

    def _anything(self) -> Draw:
        return self.net.policy.anything(self.random)

    def _close_epoch(self, log: Log) -> None:
        begin = time.monotonic()
        policy, options = self.net.policy, self.options
        self.engine.agree(self.net.base)
        policy.settle(self.epoch + 1 == options.epochs)
        tau = Temperature(options.tau_high, options.tau_low)(self.epoch / options.epochs)
        report: dict[str, Any] = {
            "epoch": self.epoch + 1,
            **self.tally.report(),
            "tau": round(tau, 6),
            "warm-up": self.warm,
        }
        report |= {f"policy_{name}": value for name, value in self.policy_tally.report().items()}
        report |= describe(policy)
        if self.data.holdout is not None:
            with self.supernet.masked(policy.sample(None).detach()):
                right, counted = count_right(self.net.base, self.data.holdout, self.engine.rank, self.engine.world)
            sums = torch.tensor([right, counted], dtype=torch.float64, device=self.engine.device)
            right, counted = self.engine.total(sums).tolist()
            report["holdout_accuracy"] = right / max(1, counted)
        report["seconds"] = round(self.tally.seconds + time.monotonic() - begin, 3)
        self.reports.append(report)
        self.tally, self.policy_tally = Tally(), Tally()
        self.epoch, self.done = self.epoch + 1, 0
        self._save(self.feed.states())
        log.add(report)
        self._tell(report)

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise InputError(
                f"the {what} is {value} at epoch {self.epoch + 1}, step {self.done + 1} of {self.steps}. Start with a lower "
                f"rate: lr={self.recipe.lr / 10:g}, or with clip=1.0.{self.keeper.last_good()}"
            )

    def _tell(self, report: Mapping[str, Any]) -> None:
        if self.on_epoch is not None and self.engine.main:
            self.on_epoch(dict(report))

    def _save(self, generators: list[Tensor]) -> None:
        begun = self._policy_steps % self.other.steps
        other = self.other.generators if begun else self.other.states()

        def state() -> dict[str, Any]:
            scaler = self.engine.scaler()
            return {
                "identity": self._identity, "epoch": self.epoch, "done": self.done, "model": tensors_of(self.net),
                "optimizer": self.optimizer.state_dict(), "adam": self.adam.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(), "random": self.random.get_state(),
                "generators": generators, "other": other, "tally": self.tally.state(),
                "policy tally": self.policy_tally.state(), "reports": self.reports,
            }  # fmt: skip

        self.keeper.save(self.epoch * self.steps + self.done, state, random_state(self.engine.device))

    def _restore(self, state: dict[str, Any]) -> None:
        fill_tensors(self.net, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.adam.load_state_dict(state["adam"])
        scaler = self.engine.scaler()
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        self.random.set_state(state["random"])
        self.epoch, self.done = state["epoch"], state["done"]
        self._began, self._other_began = state["generators"], state["other"]
        self.tally.restore(state["tally"])
        self.policy_tally.restore(state["policy tally"])
        self.reports = state["reports"]
        if self.engine.rank < len(state["each"]):
            restore_random_state(state["each"][self.engine.rank], self.engine.device)


def _add(tally: Tally, figures: Figures, seconds: float) -> None:
    tally.add(figures.values, figures.samples, figures.right, figures.judged, seconds)
