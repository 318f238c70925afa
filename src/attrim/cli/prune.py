"""``attrim prune``: from a trained network to a smaller one in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attrim.cli import options
from attrim.cli.inputs import numbers
from attrim.cli.settings import merge, parse_options
from attrim.cli.work import run_prune

__all__ = ["prune"]

METHOD, BUDGET, RECOVERY = "Method", "Budget", "Recovery"


def prune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="timm:NAME, torchvision:NAME or path/to/file.py:factory.", show_default=False
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the run. Required.")] = None,
    method: Annotated[
        str, typer.Option(rich_help_panel=METHOD, metavar="NAME", help="How channels are scored; see attrim methods.")
    ] = "l2",
    keep_macs: Annotated[
        float | None, typer.Option(rich_help_panel=BUDGET, metavar="F", help="Keep at most this fraction of the MACs.")
    ] = None,
    keep_params: Annotated[
        float | None, typer.Option(rich_help_panel=BUDGET, metavar="F", help="… of the parameters.")
    ] = None,
    keep_channels: Annotated[
        float | None, typer.Option(rich_help_panel=BUDGET, metavar="F", help="… of the channels.")
    ] = None,
    min_keep: Annotated[
        str,
        typer.Option(
            rich_help_panel=BUDGET, metavar="N|F", help="Floor of each group: channels (4) or a fraction (0.1)."
        ),
    ] = "0.1",
    multiple_of: Annotated[
        int, typer.Option(rich_help_panel=BUDGET, metavar="N", help="Round widths to multiples of N.")
    ] = 1,
    max_removed: Annotated[
        float, typer.Option(rich_help_panel=BUDGET, metavar="F", help="Remove at most this fraction of a group.")
    ] = 1.0,
    frozen: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=BUDGET,
            metavar="GLOB",
            help="Leave these axes whole: 'conv1.*', 'head.weight:0' (repeatable).",
        ),
    ] = None,
    scope: Annotated[
        str, typer.Option(rich_help_panel=BUDGET, metavar="NAME", help="global, group or isomorphic.")
    ] = "global",
    option: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=METHOD, metavar="NAME=VALUE", help="Option of the method: reduction=max (repeatable)."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(rich_help_panel=METHOD, metavar="N", help="Images that a method reads, if it needs data.")
    ] = 1024,
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
    recalibrate: Annotated[
        bool,
        typer.Option(rich_help_panel=RECOVERY, help="Measure batch-norm statistics anew after the cut (with --data)."),
    ] = True,
    finetune_epochs: Annotated[
        int, typer.Option(rich_help_panel=RECOVERY, metavar="N", help="Epochs of fine-tuning after the cut.")
    ] = 0,
    lr: Annotated[float, typer.Option(rich_help_panel=RECOVERY, metavar="F", help="Peak learning rate.")] = 0.01,
    optimizer: Annotated[str, typer.Option(rich_help_panel=RECOVERY, metavar="NAME", help="sgd or adamw.")] = "sgd",
    distill: Annotated[
        bool, typer.Option(rich_help_panel=RECOVERY, help="Let the original network teach while fine-tuning.")
    ] = True,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything that is random.")] = 0,
    device: options.Device = "auto",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings (config.yaml of a run); typed options win.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    debug: options.Debug = False,
) -> None:
    """Cut a network to a budget, prove the cut, and write the smaller network to a folder.

    With --data the batch-norm statistics are measured anew and accuracy is reported: every step on held-out training
    rows, the first and last figure on the test split. The folder holds config.yaml, metrics.jsonl, plan.json and
    model.safetensors; attrim.load(DIR, model=MyNet()) reads it back.

    **Examples**

    ```
    attrim prune timm:resnet18 --pretrained --keep-macs 0.5 --out runs/half
    attrim prune net.py:make --weights net.safetensors --input 1x3x32x32 \\
        --data data/cifar10 --method taylor --keep-macs 0.5 \\
        --frozen 'conv1.*' --finetune-epochs 3 --out runs/half
    attrim prune --config runs/half/config.yaml --keep-macs 0.3 --out runs/b
    ```
    """
    typed: dict[str, Any] = {
        name: value for name, value in context.params.items() if name not in ("context", "config", "debug")
    }
    typed |= {
        "weights": None if weights is None else str(weights),
        "min_keep": _floor(min_keep),
        "frozen": tuple(frozen or ()),
        "option": parse_options(option or []),
        "mean": None if mean is None else numbers(mean, "--mean"),
        "std": None if std is None else numbers(std, "--std"),
    }
    run_prune(merge(context, typed, config))


def _floor(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return numbers(text, "--min-keep")[0]
