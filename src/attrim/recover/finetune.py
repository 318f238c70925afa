"""Fine-tuning: one call that wins accuracy back after a cut, on one device or many, and survives being killed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from attrim.core.channels import ChannelMap
from attrim.modules.batches import batch_source, device_of
from attrim.recover.engine import make_engine
from attrim.recover.evaluate import restore_modes
from attrim.recover.feed import length_of
from attrim.recover.randomness import own_randomness
from attrim.recover.recipe import Loss, Optimizer, Precision, Recipe, Regularizer, Schedule
from attrim.recover.trainer import Trainer

__all__ = ["finetune"]


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 3,
    lr: float = 0.01,
    optimizer: Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.05,
    label_smoothing: float = 0.0,
    ema: float | None = None,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    clip: float | None = 5.0,
    accumulate: int = 1,
    precision: Precision = "no",
    temperature: float = 4.0,
    distill: float = 0.5,
    attention: float = 0.0,
    channels: ChannelMap | None = None,
    loss: Loss | None = None,
    regularizer: Regularizer | None = None,
    holdout: Iterable[Any] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    every_minutes: float | None = None,
    tensorboard: bool = False,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    description: str = "fine-tuning",
) -> nn.Module:
    """A fine-tuned copy of ``model``. Every option's meaning and range: :class:`attrim.recover.recipe.Recipe`.

    The same seed and data give the same network (bitwise on a CPU with the same number of threads), also when the run
    was killed and resumed. All random states (torch, NumPy, Python) are as before afterwards. With several processes
    (``accelerate launch``, ``torchrun``) each batch is shared out, and every process returns the same network.

    Args:
        model: the pruned classifier, on the device to train on. Not changed; its modes are those of the result.
        data: batches of ``(inputs, labels)``, or dicts with a label entry. Gone through once an epoch, so it starts anew
            each time (a DataLoader or list, not a generator) and has a length. ``set_epoch(n)`` is called if there.
        teacher: the dense network; its softened scores become part of the target. Not changed.
        epochs, lr, optimizer, momentum, weight_decay, schedule, warmup, clip, accumulate, precision: the training.
        label_smoothing, temperature, distill, attention, channels, loss, regularizer: the loss.
        ema, mixup, cutmix, seed: averaging of weights, mixing of images, and the seed of all that is random.
        holdout, folder, resume, every_minutes, tensorboard, on_epoch, description: what is reported and kept.

    Returns:
        A new module.

    Raises:
        InputError: an option out of its range, options that do not go together, nothing to train, a loss that is not
            finite (with step, rate and last good checkpoint).
        DataError: data without length or labels. CheckpointError: a checkpoint cannot be written or continued.
        MissingDependencyError: accelerate, timm or TensorBoard is needed for what was asked, and not installed.

    Example:
        >>> small = attrim.recover.finetune(small, train_batches, teacher=model, folder="runs/a", resume=True)
    """
    given = locals()
    recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
    recipe.check(teacher)
    return _tuned(model, batch_source(data), teacher, recipe)


def _tuned(model: nn.Module, source: Iterable[Any], teacher: nn.Module | None, recipe: Recipe) -> nn.Module:
    length_of(source)
    home = device_of(model)
    engine = make_engine(home, recipe.precision)
    with ExitStack() as stack:
        stack.callback(engine.close)
        # each process draws its own dropout; what concerns the data is seeded alike in all, see Feed
        stack.enter_context(own_randomness((recipe.seed + 7919 * engine.rank) % 2**63, engine.device))
        student = copy.deepcopy(model).to(engine.device).train()
        if teacher is not None:
            stack.callback(restore_modes, [(module, module.training) for module in teacher.modules()])
            teacher = teacher if device_of(teacher) == engine.device else copy.deepcopy(teacher).to(engine.device)
            teacher.eval()
        tuned = Trainer(student, teacher, source, recipe, engine).run().to(home)
    for fresh, old in zip(tuned.modules(), model.modules(), strict=True):
        fresh.training = old.training
    return tuned
