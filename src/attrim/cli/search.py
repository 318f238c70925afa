"""``attrim search``: try widths out on held-out images, and cut to the best ones."""

from __future__ import annotations

from typing import Any

import typer

from attrim.cli import options
from attrim.cli import prune_options as shared
from attrim.cli import search_options as only
from attrim.cli.inputs import numbers
from attrim.cli.search_settings import settle
from attrim.cli.search_work import run_search
from attrim.cli.settings import parse_options

__all__ = ["floor", "search"]


def search(
    context: typer.Context,
    model: shared.ModelOrConfig = None,
    out: shared.Out = None,
    criterion: only.CriterionName = "arpruning",
    option: shared.Option = None,
    samples: shared.Samples = 1024,
    algorithm: only.Algorithm = "neighbourhood",
    evaluations: only.Evaluations = 300,
    start: only.StartName = None,
    setting: only.Setting = None,
    objective: only.ObjectiveName = None,
    recalibration: only.Recalibration = 100,
    refit: only.Refit = False,
    early_stop: only.EarlyStop = True,
    memory: only.Memory = 4.0,
    storage: only.Storage = None,
    study: only.StudyName = None,
    workers: only.Workers = 1,
    keep_macs: shared.KeepMacs = None,
    keep_params: shared.KeepParams = None,
    keep_channels: shared.KeepChannels = None,
    min_keep: shared.MinKeep = "0.1",
    multiple_of: shared.MultipleOf = 1,
    max_removed: shared.MaxRemoved = 1.0,
    frozen: shared.Frozen = None,
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
    recover: shared.Recover = "free",
    finetune_epochs: shared.FinetuneEpochs = 0,
    lr: shared.LearningRate = 0.01,
    optimizer: shared.Optimizer = "sgd",
    distill: shared.Distill = True,
    seed: shared.Seed = 0,
    device: options.Device = "auto",
    config: shared.Config = None,
    resume: shared.Resume = False,
    overwrite: shared.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Search how many channels each group keeps: cut, measure batch norms anew, look at held-out rows, try other widths.

    Every candidate keeps the budget. The best one is proved, recovered and written to --out as attrim prune would. A killed
    search goes on with --resume, to the same result; the same command with --resume on another machine takes part.

    **Examples**

    ```
    attrim search net.py:make --weights net.safetensors --input 1x3x32x32 \\
        --data data/cifar10 --keep-macs 0.5 --evaluations 300 --workers 2 --out runs/a
    attrim search --resume --evaluations 500 --out runs/a
    attrim search --config runs/a/config.yaml --algorithm tpe --out runs/tpe
    attrim search … --storage postgresql://me@server/trials --out runs/b
    ```
    """
    typed: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in ("context", "config", "resume", "debug")
    }
    typed |= {name: None if typed[name] is None else numbers(typed[name], f"--{name}") for name in ("mean", "std")}
    typed |= {
        "option": parse_options(option or []),
        "setting": parse_options(setting or []),
        "frozen": tuple(frozen or ()),
    }
    typed |= {"weights": None if weights is None else str(weights), "min_keep": floor(min_keep)}
    run_search(settle(context, typed, config, resume), resume=resume)


def floor(text: str) -> int | float:
    """A number of channels, or a fraction.

    Raises:
        InputError: neither.
    """
    return int(text) if text.isdigit() else numbers(text, "--min-keep")[0]
