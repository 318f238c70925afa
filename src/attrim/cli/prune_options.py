"""Options of ``attrim prune`` alone, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Config",
    "Distill",
    "FinetuneEpochs",
    "Frozen",
    "KeepChannels",
    "KeepMacs",
    "KeepParams",
    "LearningRate",
    "MaxRemoved",
    "Method",
    "MinKeep",
    "ModelOrConfig",
    "MultipleOf",
    "Optimizer",
    "Option",
    "Out",
    "Overwrite",
    "Recover",
    "Resume",
    "Rounds",
    "Samples",
    "Scope",
    "Seed",
]

METHOD, BUDGET, RECOVERY = "Method", "Budget", "Recovery"

ModelOrConfig = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or path/to/file.py:factory.", show_default=False),
]
Out = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the run. Required.")]

Method = Annotated[
    str, typer.Option(rich_help_panel=METHOD, metavar="NAME", help="How channels are scored; see attrim methods.")
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=METHOD, metavar="NAME=VALUE", help="Option of the method: reduction=max (repeatable)."
    ),
]
Samples = Annotated[
    int, typer.Option(rich_help_panel=METHOD, metavar="N", help="Images that a method reads, if it needs data.")
]

KeepMacs = Annotated[
    float | None, typer.Option(rich_help_panel=BUDGET, metavar="F", help="Keep at most this fraction of the MACs.")
]
KeepParams = Annotated[float | None, typer.Option(rich_help_panel=BUDGET, metavar="F", help="… of the parameters.")]
KeepChannels = Annotated[float | None, typer.Option(rich_help_panel=BUDGET, metavar="F", help="… of the channels.")]
MinKeep = Annotated[
    str,
    typer.Option(rich_help_panel=BUDGET, metavar="N|F", help="Floor of each group: channels (4) or a fraction (0.1)."),
]
MultipleOf = Annotated[int, typer.Option(rich_help_panel=BUDGET, metavar="N", help="Round widths to multiples of N.")]
MaxRemoved = Annotated[
    float, typer.Option(rich_help_panel=BUDGET, metavar="F", help="Remove at most this fraction of a group.")
]
Frozen = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=BUDGET, metavar="GLOB", help="Leave these axes whole: 'conv1.*', 'head.weight:0' (repeatable)."
    ),
]
Scope = Annotated[str, typer.Option(rich_help_panel=BUDGET, metavar="NAME", help="global, group or isomorphic.")]

Rounds = Annotated[
    int,
    typer.Option(
        rich_help_panel=RECOVERY, metavar="N", help="Cut in N rounds, with new scores and --recover after each."
    ),
]
Recover = Annotated[
    str,
    typer.Option(
        rich_help_panel=RECOVERY,
        metavar="NAME",
        help="Without training, with --data: free (refit every layer to the original), recalibrate (measure batch norm "
        "anew) or none.",
    ),
]
FinetuneEpochs = Annotated[
    int, typer.Option(rich_help_panel=RECOVERY, metavar="N", help="Epochs of fine-tuning after the cut.")
]
LearningRate = Annotated[float, typer.Option(rich_help_panel=RECOVERY, metavar="F", help="Peak learning rate.")]
Optimizer = Annotated[str, typer.Option(rich_help_panel=RECOVERY, metavar="NAME", help="sgd or adamw.")]
Distill = Annotated[
    bool, typer.Option(rich_help_panel=RECOVERY, help="Let the original network teach while fine-tuning.")
]

Seed = Annotated[int, typer.Option(metavar="N", help="Of everything that is random.")]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Settings (config.yaml of a run); typed options win.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished run in --out, with its own settings.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")]
