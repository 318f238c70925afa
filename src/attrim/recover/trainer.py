"""The training loop: batches, steps and epochs, and everything that changes while a network learns."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import InputError
from attrim.modules.batches import logits_of, run_batch
from attrim.modules.progress import progress
from attrim.recover.ema import moving_average
from attrim.recover.engine import Engine
from attrim.recover.evaluate import count_right, restore_modes
from attrim.recover.feed import Feed, Portion
from attrim.recover.keeper import Keeper, fill_tensors, tensors_of, weights_digest
from attrim.recover.metrics import Log, Tally, class_hits
from attrim.recover.mixing import Mixer
from attrim.recover.objective import Objective, Parts
from attrim.recover.randomness import Stream, random_state, restore_random_state
from attrim.recover.recipe import Recipe
from attrim.recover.schedule import warmup_constant, warmup_cosine
from attrim.recover.transfer import AttentionTransfer, choose_places

__all__ = ["Trainer", "make_optimizer"]


class Trainer:
    """One run.

    Args:
        network: trained in place; in train mode, on the engine's device.
        teacher: in eval mode, on the same device; or None.
        source: batches.
        recipe: what was asked for, checked.
        engine: where it happens.
    """

    def __init__(
        self, network: nn.Module, teacher: nn.Module | None, source: Any, recipe: Recipe, engine: Engine
    ) -> None:
        self.network, self.teacher, self.recipe, self.engine = network, teacher, recipe, engine
        self.feed = Feed(source, seed=recipe.seed, device=engine.device, rank=engine.rank, world=engine.world)
        self.steps = self.feed.steps
        self.updates = -(-self.steps // recipe.accumulate)
        self.keeper = Keeper(recipe, engine)
        self._digest = "" if recipe.folder is None else weights_digest(network)
        self.optimizer = make_optimizer(network, recipe)
        self.average = None if recipe.ema is None else moving_average(network, recipe.ema)
        self.transfer = self._look_ahead()
        self.call, self.stepper = engine.prepare(network, self.optimizer)
        self.objective = Objective(recipe, self.transfer)
        self.tally, self.reports = Tally(), list[dict[str, Any]]()
        self.epoch, self.done = 0, 0  # the epoch under way, and how many of its batches are done
        self.rate = 0.0
        self._identity: dict[str, Any] = {}
        self._began: list[Tensor] | None = None

    def run(self) -> nn.Module:
        """Train to the end, from the beginning or from a checkpoint.

        Returns:
            The network, or its moving average.
        """
        folder = None if self.recipe.folder is None or not self.engine.main else Path(self.recipe.folder)
        with ExitStack() as stack:
            state = self.keeper.take_up(self.identity, self.network)
            if self.transfer is not None and self.teacher is not None:
                stack.enter_context(self.transfer.watching(self.network, self.teacher))
            if state is not None:
                self._restore(state)
            log = Log(folder, self.recipe.tensorboard, self.reports)
            stack.callback(log.close)
            for report in self.reports:
                self._tell(report)
            left = self.steps * (self.recipe.epochs - self.epoch) - self.done
            for portion in progress(self._portions(log), self.recipe.description, left, show=self.engine.main):
                self._batch(portion)
        return self.network if self.average is None else self.average.module

    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        self._identity = self._identity or {
            **self.recipe.identity(),
            "batches an epoch": self.steps,
            "weights of the model": self._digest,
            "weights of the teacher": None if self.teacher is None else weights_digest(self.teacher),
        }
        return self._identity

    def _portions(self, log: Log) -> Iterator[Portion]:
        while self.epoch < self.recipe.epochs:
            began, self._began = self._began, None
            yield from self.feed.epoch(self.epoch, self.done, began)
            self._close_epoch(log)

    def _batch(self, portion: Portion) -> None:
        begin = time.monotonic()
        recipe, index = self.recipe, self.done
        first = index - index % recipe.accumulate
        together = min(recipe.accumulate, self.steps - first)
        last = index + 1 == first + together
        update, updates = self.epoch * self.updates + index // recipe.accumulate, recipe.epochs * self.updates
        self.rate = recipe.lr * _factor(recipe, update, updates)
        if index == first:
            self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if last else self.engine.alone(self.call):
            figures, samples, right, judged, due = self._learn(portion, update / max(1, updates - 1), together)
        self._check(figures["loss"], "the loss is", index + 1)
        if last:
            self._step()
        self.done += 1
        self.tally.add(figures, samples, right, judged, time.monotonic() - begin)
        if last and due and self.done < self.steps:
            self._check(_extreme(self.network), "the largest weight is", self.done)
            self._save(self.feed.generators)

    def _learn(
        self, portion: Portion, progressed: float, together: int
    ) -> tuple[dict[str, float], float, float, float, float]:
        """Gradients of one batch.

        Returns:
            The loss and its parts as means over the samples of all processes; their number; right answers and how many
            could be judged; whether a checkpoint is due.
        """
        batch, engine, size = portion.batch, self.engine, float(portion.size)
        outputs = self.call(batch)
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), engine.autocast():
                taught = run_batch(self.teacher, batch)
        parts = self.objective(outputs, taught, batch, self.network, progressed)
        loss = parts.data
        if engine.world > 1:  # processes count by their rows, then their gradients are averaged
            whole = engine.total(torch.tensor([size], device=engine.device))
            loss = loss * (size * engine.world / float(whole))
        loss = loss if parts.regularizer is None else loss + parts.regularizer
        engine.backward(loss / together if together > 1 else loss)
        right, judged = class_hits(outputs, batch.labels)
        counts = (float(right) if size else 0.0, judged if size else 0, size, self.keeper.due)
        values = _values(parts)
        rows = torch.tensor([*(value * size for value in values.values()), *counts], dtype=torch.float64)
        *sums, hits, counted, samples, due = engine.total(rows.to(engine.device)).tolist()
        figures = {name: value / samples for name, value in zip(values, sums, strict=True)}
        return figures, samples, hits, counted, due

    def _step(self) -> None:
        if self.recipe.clip is not None:
            self.engine.clip(self.network.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.stepper.step()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _close_epoch(self, log: Log) -> None:
        begin = time.monotonic()
        self.engine.agree(self.network)
        if self.average is not None:
            self.engine.agree(self.average)
        self._check(_extreme(self.network), "the largest weight is", self.done)
        report: dict[str, Any] = {"epoch": self.epoch + 1, **self.tally.report(), "lr": self.rate}
        if self.recipe.holdout is not None:
            report["holdout_accuracy"] = self._holdout(self.recipe.holdout)
        report["seconds"] = round(self.tally.seconds + time.monotonic() - begin, 3)
        report["images_per_second"] = round(self.tally.samples / max(self.tally.seconds, 1e-9), 1)
        self.reports.append(report)
        self.tally, self.epoch, self.done = Tally(), self.epoch + 1, 0
        self._save(self.feed.states())
        log.add(report)
        self._tell(report)

    def _holdout(self, batches: Iterable[Any]) -> float:
        judged = self.network if self.average is None else self.average.module
        aside = Stream()
        aside.seed(self.recipe.seed)
        with aside.use():
            right, counted = count_right(judged, batches, self.engine.rank, self.engine.world)
        sums = torch.tensor([right, counted], dtype=torch.float64, device=self.engine.device)
        total, of = self.engine.total(sums).tolist()
        return float(total / of)

    def _look_ahead(self) -> AttentionTransfer | None:
        """What has to be known before learning: the classes, and where attention is compared."""
        recipe, teacher = self.recipe, self.teacher
        if not recipe.mixes and not recipe.attention:
            return None
        batch = self.feed.first()
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        with torch.no_grad():
            if recipe.mixes:
                classes = logits_of(run_batch(self.network, batch)).shape[1]
                self.feed.mixer = Mixer(recipe.mixup, recipe.cutmix, recipe.label_smoothing, classes)
            places = None
            if recipe.attention and recipe.channels is not None and teacher is not None:
                places = choose_places(recipe.channels, teacher, lambda model: run_batch(model, batch), self.network)
            restore_modes(modes)
            return None if places is None else AttentionTransfer(places)

    def _check(self, value: float, what: str, step: int) -> None:
        if math.isfinite(value):
            return
        raise InputError(
            f"{what} {value} at epoch {self.epoch + 1}, step {step} of {self.steps}, with a learning rate of "
            f"{self.rate:.3g}. Start with a lower rate: finetune(..., lr={self.recipe.lr / 10:g}), or with clip=1.0."
            f"{self.keeper.last_good()}"
        )

    def _tell(self, report: dict[str, Any]) -> None:
        if self.recipe.on_epoch is not None and self.engine.main:
            self.recipe.on_epoch(dict(report))

    def _save(self, generators: list[Tensor]) -> None:
        def state() -> dict[str, Any]:
            scaler = self.engine.scaler()
            return {
                "identity": self.identity(),
                "epoch": self.epoch,
                "done": self.done,
                "model": tensors_of(self.network),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "average": None if self.average is None else tensors_of(self.average),
                "generators": generators,
                "tally": self.tally.state(),
                "reports": self.reports,
            }

        self.keeper.save(self.epoch * self.steps + self.done, state, random_state(self.engine.device))

    def _restore(self, state: dict[str, Any]) -> None:
        fill_tensors(self.network, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            fill_tensors(self.average, state["average"])
        scaler = self.engine.scaler()
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        self.epoch, self.done, self._began = state["epoch"], state["done"], state["generators"]
        self.tally.restore(state["tally"])
        self.reports = state["reports"]
        if self.engine.rank < len(state["each"]):
            restore_random_state(state["each"][self.engine.rank], self.engine.device)


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; weight decay on tensors with two dimensions or more.

    Raises:
        InputError: no parameter requires a gradient.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    if not trainable:
        raise InputError("the model has no parameter that requires a gradient. Call model.requires_grad_(True).")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _factor(recipe: Recipe, update: int, updates: int) -> float:
    shape = warmup_cosine if recipe.schedule == "cosine" else warmup_constant
    return shape(update, updates, round(recipe.warmup * updates))


def _values(parts: Parts) -> dict[str, float]:
    """The loss, and its parts where there is more than one."""
    tensors = {"loss": parts.data.detach() if parts.regularizer is None else (parts.data + parts.regularizer).detach()}
    tensors |= parts.named if len(parts.named) > 1 else {}
    return dict(zip(tensors, torch.stack([t.double() for t in tensors.values()]).tolist(), strict=True))


@torch.no_grad()
def _extreme(network: nn.Module) -> float:
    """The largest absolute weight; not finite when any weight is not."""
    largest = [p.detach().abs().amax().double() for p in network.parameters() if p.numel()]
    return float(torch.stack(largest).amax()) if largest else 0.0
