"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchSize",
    "Data",
    "Debug",
    "Device",
    "Flip",
    "Input",
    "Limit",
    "Mean",
    "Model",
    "NumClasses",
    "Pretrained",
    "RandAugment",
    "Std",
    "Weights",
]

MODEL, DATA = "Model", "Data"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or path/to/file.py:factory.", show_default=False),
]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", rich_help_panel=MODEL, help="Weights to load (.safetensors).")
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", rich_help_panel=MODEL, help="Download the weights of timm or torchvision.")
]
NumClasses = Annotated[int | None, typer.Option(metavar="N", rich_help_panel=MODEL, help="Outputs of the classifier.")]
Input = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        rich_help_panel=MODEL,
        help="Example input, batch first: 1x3x32x32. Several: 1x16:int,1x8. Known for libraries.",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 …")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=DATA,
        help="Labelled images: a parquet file or folder, an image folder, or a data set of the hub.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=DATA, help="Read only the first N training rows.")
]
BatchSize = Annotated[int, typer.Option(metavar="N", rich_help_panel=DATA, help="Images per batch.")]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        rich_help_panel=DATA,
        help="Mean of images in [0, 1], per channel. Default: the model's own or ImageNet's.",
    ),
]
Std = Annotated[str | None, typer.Option(metavar="A,B,C", rich_help_panel=DATA, help="Deviation, likewise.")]
Flip = Annotated[
    bool, typer.Option(rich_help_panel=DATA, help="Mirror half of the training images (not for digits or text).")
]
RandAugment = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DATA,
        metavar="NAME",
        help="timm's notation, such as rand-m9-mstd0.5; for training only, never for statistics.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
