"""``attrim prune``: from a trained network to a smaller one in a folder."""

from __future__ import annotations

from typing import Any

import typer

from attrim.cli import options
from attrim.cli import prune_options as only
from attrim.cli.inputs import numbers
from attrim.cli.settings import PruneSettings, keep_on, merge, parse_options
from attrim.cli.work import run_prune

__all__ = ["prune"]


def prune(
    context: typer.Context,
    model: only.ModelOrConfig = None,
    out: only.Out = None,
    method: only.Method = "l2",
    keep_macs: only.KeepMacs = None,
    keep_params: only.KeepParams = None,
    keep_channels: only.KeepChannels = None,
    min_keep: only.MinKeep = "0.1",
    multiple_of: only.MultipleOf = 1,
    max_removed: only.MaxRemoved = 1.0,
    frozen: only.Frozen = None,
    scope: only.Scope = "global",
    option: only.Option = None,
    samples: only.Samples = 1024,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.NumClasses = None,
    input: options.Input = None,
    data: options.Data = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 128,
    mean: options.Mean = None,
    std: options.Std = None,
    flip: options.Flip = True,
    randaugment: options.RandAugment = None,
    rounds: only.Rounds = 1,
    recover: only.Recover = "free",
    finetune_epochs: only.FinetuneEpochs = 0,
    lr: only.LearningRate = 0.01,
    optimizer: only.Optimizer = "sgd",
    distill: only.Distill = True,
    seed: only.Seed = 0,
    device: options.Device = "auto",
    config: only.Config = None,
    resume: only.Resume = False,
    overwrite: only.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Cut a network to a budget, prove the cut, and write the smaller network to a folder.

    With --data the batch-norm statistics are measured anew and accuracy is reported: every step on held-out training
    rows, the first and last figure on the test split. The folder holds config.yaml, metrics.jsonl, plan.json,
    model.safetensors and pictures (architecture.svg, what a method did); attrim.load(DIR, model=MyNet()) reads it back. A run that was killed while it fine-tuned goes on
    with --resume, to the same result.

    **Examples**

    ```
    attrim prune timm:resnet18 --pretrained --keep-macs 0.5 --out runs/half
    attrim prune net.py:make --weights net.safetensors --input 1x3x32x32 \\
        --data data/cifar10 --method taylor --keep-macs 0.5 \\
        --frozen 'conv1.*' --finetune-epochs 3 --out runs/half
    attrim prune --config runs/half/config.yaml --keep-macs 0.3 --out runs/b
    attrim prune --resume --out runs/half
    ```
    """
    typed: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in ("context", "config", "resume", "debug")
    }
    typed |= {
        "weights": None if weights is None else str(weights),
        "min_keep": _floor(min_keep),
        "frozen": tuple(frozen or ()),
        "option": parse_options(option or []),
        "mean": None if mean is None else numbers(mean, "--mean"),
        "std": None if std is None else numbers(std, "--std"),
    }
    settle = keep_on if resume else merge
    run_prune(settle(context, typed, config, PruneSettings), resume=resume)


def _floor(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return numbers(text, "--min-keep")[0]
