"""A short fine-tuning run on one device: enough to win accuracy back after a cut, with nothing to set up."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrim.errors import DataError, InputError
from attrim.modules.batches import batch_source, device_of, logits_of, read_batch, run_batch
from attrim.modules.progress import progress
from attrim.recover.evaluate import restore_modes
from attrim.recover.losses import mixed_loss
from attrim.recover.schedule import warmup_cosine

__all__ = ["finetune"]


@dataclass(frozen=True, slots=True)
class _Recipe:
    epochs: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    temperature: float
    distill: float


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    lr: float = 0.01,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup: float = 0.05,
    label_smoothing: float = 0.0,
    temperature: float = 4.0,
    distill: float = 0.5,
    seed: int = 0,
    on_epoch: Callable[[Mapping[str, float]], None] | None = None,
    description: str = "fine-tuning",
) -> nn.Module:
    """A fine-tuned copy of ``model``: SGD (Nesterov) or AdamW, warm-up and cosine, label smoothing, distillation.

    Weight decay leaves out biases and norms. The same seed and data give the same network (bitwise on a CPU with the
    same number of threads), and torch's random state is as before afterwards.

    Args:
        model: the pruned classifier. Not changed; its modes are those of the result.
        data: batches of ``(inputs, labels)``, or dicts with a label entry. Gone through once an epoch, so it must start
            anew each time (a DataLoader or list, not a generator) and have a length. ``data.set_epoch(n)`` is called
            where it exists.
        teacher: the dense network; its softened scores become part of the target. Not changed.
        epochs: passes over ``data``.
        lr: peak learning rate.
        optimizer: ``sgd`` or ``adamw``.
        momentum: of SGD.
        weight_decay: of weights with two dimensions or more.
        warmup: share of the run in which the rate rises, in [0, 1).
        label_smoothing: in [0, 1).
        temperature: of the distillation.
        distill: weight of the teacher against the labels, in [0, 1].
        seed: of dropout and of shuffling that draws from torch's generator.
        on_epoch: called after each epoch with ``epoch`` (from 1), ``loss``, ``accuracy`` (on the training batches as
            they went by; absent without class labels), ``lr`` and ``seconds``.
        description: stands beside the progress bar.

    Returns:
        A new module.

    Raises:
        InputError: an argument out of its range, nothing to train, or a loss that is not finite (with step and rate).
        DataError: data without length or labels.

    Example:
        >>> small = attrim.recover.finetune(small, train_batches, teacher=model, epochs=3, lr=0.02)
    """
    recipe = _Recipe(epochs, lr, optimizer, momentum, weight_decay, warmup, label_smoothing, temperature, distill)
    _check(recipe)
    source = batch_source(data)
    steps = _length(source)
    student = copy.deepcopy(model)
    modes = [(module, module.training) for module in student.modules()]
    device = device_of(student)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        student.train()
        teacher_modes = [] if teacher is None else [(m, m.training) for m in teacher.modules()]
        try:
            if teacher is not None:
                teacher.eval()
            _train(student, teacher, source, steps, recipe, on_epoch, description)
        finally:
            restore_modes(teacher_modes)
    restore_modes(modes)
    return student


def _train(
    student: nn.Module,
    teacher: nn.Module | None,
    source: Iterable[Any],
    steps: int,
    recipe: _Recipe,
    on_epoch: Callable[[Mapping[str, float]], None] | None,
    description: str,
) -> None:
    total = steps * recipe.epochs
    device = device_of(student)
    optimizer = _optimizer(student, recipe)
    tally = _Tally(steps)
    for step, raw in enumerate(progress(_epochs(source, steps, recipe.epochs), description, total)):
        rate = recipe.lr * warmup_cosine(step, total, round(recipe.warmup * total))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = read_batch(raw, device)
        scores = logits_of(run_batch(student, batch))
        with torch.no_grad():
            target = None if teacher is None else logits_of(run_batch(teacher, batch))
        loss = mixed_loss(
            scores,
            batch.labels,
            target,
            label_smoothing=recipe.label_smoothing,
            temperature=recipe.temperature,
            distill=recipe.distill,
        )
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} at epoch {step // steps + 1}, step {step % steps + 1} of {steps}, with a "
                f"learning rate of {rate:.3g}. Start with a lower rate: finetune(..., lr={recipe.lr / 10:g})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tally.add(value, scores.detach(), batch.labels, batch.size)
        if (step + 1) % steps == 0:
            report = tally.close((step + 1) // steps, rate)
            if on_epoch is not None:
                on_epoch(report)


class _Tally:
    """Loss and accuracy of the epoch under way."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._clear()

    def _clear(self) -> None:
        self.loss, self.right, self.seen, self.judged = 0.0, 0, 0, 0
        self.begin = time.monotonic()

    def add(self, loss: float, scores: Tensor, labels: Any, size: int) -> None:
        self.loss += loss * size
        self.seen += size
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            self.right += int((scores.argmax(1) == labels).sum())
            self.judged += labels.numel()

    def close(self, epoch: int, rate: float) -> dict[str, float]:
        report = {"epoch": epoch, "loss": self.loss / max(1, self.seen), "lr": rate}
        if self.judged:
            report["accuracy"] = self.right / self.judged
        report["seconds"] = time.monotonic() - self.begin
        self._clear()
        return report


def _epochs(source: Iterable[Any], steps: int, epochs: int) -> Iterator[Any]:
    for epoch in range(epochs):
        set_epoch = getattr(source, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        seen = 0
        for raw in source:
            seen += 1
            yield raw
        if seen != steps:
            raise DataError(
                f"data: len(data) promises {steps} batches, epoch {epoch + 1} gave {seen}. Expected the same number in "
                "every epoch: a DataLoader or a list."
            )


def _optimizer(model: nn.Module, recipe: _Recipe) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
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


def _length(source: Any) -> int:
    try:
        steps = len(source)
    except TypeError as error:
        raise DataError(
            f"data: fine-tuning goes through the data once an epoch and needs its length, found "
            f"{type(source).__name__} without one. Pass a DataLoader, or list(batches)."
        ) from error
    if not steps:
        raise DataError("data: expected at least one batch, found none.")
    return int(steps)


def _check(recipe: _Recipe) -> None:
    limits = (
        ("epochs", recipe.epochs >= 1, "an int >= 1"),
        ("lr", recipe.lr > 0 and math.isfinite(recipe.lr), "a number > 0"),
        ("optimizer", recipe.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
        ("momentum", 0 <= recipe.momentum < 1, "a number in [0, 1)"),
        ("weight_decay", recipe.weight_decay >= 0, "a number >= 0"),
        ("warmup", 0 <= recipe.warmup < 1, "a share of the run in [0, 1)"),
        ("label_smoothing", 0 <= recipe.label_smoothing < 1, "a number in [0, 1)"),
        ("temperature", recipe.temperature > 0, "a number > 0"),
        ("distill", 0 <= recipe.distill <= 1, "a weight in [0, 1]"),
    )
    for name, good, expected in limits:
        if not good:
            raise InputError(f"{name}: expected {expected}, found {getattr(recipe, name)!r}.")
