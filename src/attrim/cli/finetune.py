"""``attrim finetune``: train a pruned network, or any other, from the command line."""

from __future__ import annotations

from typing import Any

import typer

from attrim.cli import options
from attrim.cli import prune_options as shared
from attrim.cli import tune_options as only
from attrim.cli.inputs import numbers
from attrim.cli.settings import keep_on, merge
from attrim.cli.tune_settings import FinetuneSettings
from attrim.cli.tune_work import run_finetune

__all__ = ["finetune"]


def finetune(
    context: typer.Context,
    source: only.SourceOrConfig = None,
    out: shared.Out = None,
    epochs: only.Epochs = 3,
    lr: only.LearningRate = 0.01,
    optimizer: only.Optimizer = "sgd",
    momentum: only.Momentum = 0.9,
    weight_decay: only.WeightDecay = 5e-4,
    schedule: only.Schedule = "cosine",
    warmup: only.Warmup = 0.05,
    ema: only.Ema = None,
    mixup: only.Mixup = 0.0,
    cutmix: only.Cutmix = 0.0,
    clip: only.Clip = None,
    accumulate: only.Accumulate = 1,
    precision: only.Precision = "no",
    teacher: only.Teacher = None,
    distill: only.Distill = 0.5,
    temperature: only.Temperature = 4.0,
    attention: only.Attention = 0.0,
    label_smoothing: only.LabelSmoothing = 0.0,
    data: options.Data = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 128,
    mean: options.Mean = None,
    std: options.Std = None,
    flip: options.Flip = True,
    randaugment: options.RandAugment = None,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.NumClasses = None,
    input: options.Input = None,
    every_minutes: only.EveryMinutes = None,
    tensorboard: only.TensorBoard = False,
    seed: shared.Seed = 0,
    device: options.Device = "auto",
    config: shared.Config = None,
    resume: shared.Resume = False,
    overwrite: shared.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a pruned network with the original as its teacher, or any network without one.

    A RUN is a folder that attrim prune or attrim finetune wrote; model, weights, input and images are those of that run
    unless given here. Accuracy after each epoch is on held-out training rows, the final figure on the test split. The
    result lies in --out as attrim prune would write it; a killed run goes on with --resume, to the same result.

    **Examples**

    ```
    attrim finetune runs/half --data data/cifar10 --epochs 30 --lr 0.02 \\
        --out runs/half-tuned
    attrim finetune runs/half --attention 1000 --ema 0.999 --mixup 0.2 --out runs/b
    attrim finetune timm:resnet18 --pretrained --data data/pets --out runs/pets
    attrim finetune --resume --out runs/half-tuned
    ```
    """
    typed: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in ("context", "config", "resume", "debug")
    }
    typed |= {
        "weights": None if weights is None else str(weights),
        "mean": None if mean is None else numbers(mean, "--mean"),
        "std": None if std is None else numbers(std, "--std"),
    }
    settle = keep_on if resume else merge
    run_finetune(settle(context, typed, config, FinetuneSettings, "finetune"), resume=resume)
