"""The settings of a fine-tuning run: what each means, what it may be, and which do not go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from attrim.core.channels import ChannelMap
from attrim.errors import InputError

__all__ = ["Loss", "Optimizer", "Precision", "Recipe", "Regularizer", "Schedule"]

Optimizer = Literal["sgd", "adamw"]
Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["cosine", "constant"]
Loss = Callable[[Any, Any], Tensor]
"""``(outputs, batch) -> scalar``: the mean loss of a batch, given as the source yields it, on the model's device."""
Regularizer = Callable[[nn.Module, float], Tensor]
"""``(model, progress) -> scalar``: a term added to the loss; progress runs from 0 to 1 over the run."""

MINUTES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """Everything :func:`attrim.recover.finetune` can be told.

    Attributes:
        epochs: passes over the data, at least 1.
        lr: peak learning rate.
        optimizer: ``sgd`` (Nesterov) or ``adamw``.
        momentum: of SGD, in [0, 1).
        weight_decay: of weights with two dimensions or more; biases and norms are left out.
        schedule: after the warm-up ``cosine`` falls to zero, ``constant`` stays.
        warmup: share of the run in which the rate rises, in [0, 1).
        label_smoothing: share of a target that is spread over all classes, in [0, 1).
        ema: decay of an exponential moving average of weights and buffers, in (0, 1); the average is the result. The
            decay itself rises as ``(1 + n) / (10 + n)``, so that a short run forgets where it began. None for none.
        mixup, cutmix: alpha of the Beta distribution (timm's Mixup); 0 for none, both may be given.
        clip: the largest norm of all gradients together; None for none. Networks whose layers were refitted can have steep
            directions: without it, one trained ResNet-20 fell from 70.5 to 39.9 % within two epochs, with it, it rose to 77.7.
        accumulate: batches whose gradients make one step of the optimiser; the last step of an epoch may have fewer.
        precision: ``no``, ``bf16`` or ``fp16`` (needs a GPU). Weights stay in their own precision.
        temperature: of the distillation.
        distill: weight of the teacher's scores against the labels, in [0, 1].
        attention: weight of attention transfer from the teacher, 0 for none; needs ``teacher`` and ``channels``.
        channels: the channel map of the teacher; its taps are where attention is compared.
        loss: ``(outputs, batch) -> scalar`` instead of cross entropy; the mean over the batch.
        regularizer: ``(model, progress) -> scalar``, added to the loss; progress runs from 0 to 1.
        holdout: labelled batches; the accuracy on them is reported after each epoch, and nothing is learned from them.
        seed: of everything random that the run itself does.
        folder: where checkpoints and ``metrics.jsonl`` go; None writes nothing.
        resume: go on from the newest whole checkpoint in ``folder``, from the start where there is none.
        every_minutes: time between checkpoints within an epoch (with a folder; 10 unless given); ``inf`` for none.
        tensorboard: also write TensorBoard events into ``folder``.
        on_epoch: called after each epoch with its figures; after ``resume`` first for the epochs that were done before.
        description: stands beside the progress bar.
    """

    epochs: int = 3
    lr: float = 0.01
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    label_smoothing: float = 0.0
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    clip: float | None = 5.0
    accumulate: int = 1
    precision: Precision = "no"
    temperature: float = 4.0
    distill: float = 0.5
    attention: float = 0.0
    channels: ChannelMap | None = None
    loss: Loss | None = None
    regularizer: Regularizer | None = None
    holdout: Iterable[Any] | None = None
    seed: int = 0
    folder: str | Path | None = None
    resume: bool = False
    every_minutes: float | None = None
    tensorboard: bool = False
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None
    description: str = "fine-tuning"

    def check(self, teacher: nn.Module | None) -> None:
        """Refuse what is out of its range or does not go together.

        Raises:
            InputError: the setting is named, with what was expected and found.
        """
        for name, good, expected in self._limits():
            if not good:
                raise InputError(f"{name}: expected {expected}, found {getattr(self, name)!r}.")
        for wrong, text in self._clashes(teacher):
            if wrong:
                raise InputError(text)

    @property
    def minutes(self) -> float:
        """Time between checkpoints within an epoch."""
        return MINUTES if self.every_minutes is None else self.every_minutes

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain values: a checkpoint is continued only by the same."""
        aside = {"holdout", "folder", "resume", "every_minutes", "tensorboard", "on_epoch", "description"}
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in aside}
        plain["channels"] = None if self.channels is None or not self.attention else self.channels.fingerprint
        for name in ("loss", "regularizer"):
            given = plain[name]
            plain[name] = None if given is None else getattr(given, "__qualname__", type(given).__qualname__)
        return plain

    def _limits(self) -> tuple[tuple[str, bool, str], ...]:
        return (
            ("epochs", _whole(self.epochs), "an int >= 1"),
            ("lr", 0 < self.lr < math.inf, "a number > 0"),
            ("optimizer", self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0"),
            ("schedule", self.schedule in ("cosine", "constant"), "'cosine' or 'constant'"),
            ("warmup", 0 <= self.warmup < 1, "a share of the run in [0, 1)"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            ("ema", self.ema is None or 0 < self.ema < 1, "a decay in (0, 1), such as 0.999, or None"),
            ("mixup", 0 <= self.mixup < math.inf, "a number >= 0"),
            ("cutmix", 0 <= self.cutmix < math.inf, "a number >= 0"),
            ("clip", self.clip is None or 0 < self.clip < math.inf, "a norm > 0, or None"),
            ("accumulate", _whole(self.accumulate), "an int >= 1"),
            ("precision", self.precision in ("no", "bf16", "fp16"), "'no', 'bf16' or 'fp16'"),
            ("temperature", 0 < self.temperature < math.inf, "a number > 0"),
            ("distill", 0 <= self.distill <= 1, "a weight in [0, 1]"),
            ("attention", 0 <= self.attention < math.inf, "a weight >= 0"),
            ("every_minutes", self.every_minutes is None or self.every_minutes > 0, "minutes > 0, or None"),
            ("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**63, "an int >= 0"),
        )

    def _clashes(self, teacher: nn.Module | None) -> tuple[tuple[bool, str], ...]:
        return (
            (
                self.attention > 0 and teacher is None,
                "attention compares the model with a teacher, and there is none. Pass teacher=dense_model, or attention=0.",
            ),
            (
                self.attention > 0 and self.channels is None,
                "attention needs the places where it is compared. Pass channels=attrim.trace(dense_model, example_inputs).",
            ),
            (
                self.attention == 0 and self.channels is not None,
                "channels tells where attention is compared, but its weight is 0. Pass attention=1000.0, or leave "
                "channels out.",
            ),
            (
                self.loss is not None and self.label_smoothing > 0,
                "label_smoothing belongs to cross entropy, which loss=... replaces. Smooth in your own loss.",
            ),
            (
                self.loss is not None and self.mixes,
                "mixup and cutmix mix the labels of cross entropy, which loss=... replaces. Mix in your own data.",
            ),
            (self.resume and self.folder is None, "resume=True goes on from a folder. Pass folder='runs/mine'."),
            (
                self.tensorboard and self.folder is None,
                "tensorboard=True writes into a folder. Pass folder='runs/mine'.",
            ),
            (
                self.every_minutes is not None and self.folder is None,
                "every_minutes is the time between checkpoints, which need a folder. Pass folder='runs/mine'.",
            ),
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
