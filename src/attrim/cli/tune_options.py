"""Options of ``attrim finetune`` alone, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Accumulate",
    "Attention",
    "Clip",
    "Cutmix",
    "Distill",
    "Ema",
    "Epochs",
    "EveryMinutes",
    "LabelSmoothing",
    "LearningRate",
    "Mixup",
    "Momentum",
    "Optimizer",
    "Precision",
    "Schedule",
    "SourceOrConfig",
    "Teacher",
    "Temperature",
    "TensorBoard",
    "Warmup",
    "WeightDecay",
]

TRAINING, LOSS, KEEPING = "Training", "Loss", "Keeping"

SourceOrConfig = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A folder of attrim prune or attrim finetune, or timm:NAME, torchvision:NAME, path/to/file.py:factory.",
        show_default=False,
    ),
]

Epochs = Annotated[int, typer.Option(rich_help_panel=TRAINING, metavar="N", help="Passes over the images.")]
LearningRate = Annotated[float, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Peak learning rate.")]
Optimizer = Annotated[str, typer.Option(rich_help_panel=TRAINING, metavar="NAME", help="sgd (Nesterov) or adamw.")]
Momentum = Annotated[float, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Of SGD.")]
WeightDecay = Annotated[
    float, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Of weights; biases and norms are left out.")
]
Schedule = Annotated[
    str, typer.Option(rich_help_panel=TRAINING, metavar="NAME", help="After the warm-up: cosine (to zero) or constant.")
]
Warmup = Annotated[
    float, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Share of the run in which the rate rises.")
]
Ema = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=TRAINING, metavar="F", help="Decay of an average of the weights, which is the result."
    ),
]
Mixup = Annotated[float, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Alpha of mixup; 0 for none.")]
Cutmix = Annotated[float, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Alpha of CutMix; 0 for none.")]
Clip = Annotated[
    float | None, typer.Option(rich_help_panel=TRAINING, metavar="F", help="Largest norm of the gradients together.")
]
Accumulate = Annotated[
    int, typer.Option(rich_help_panel=TRAINING, metavar="N", help="Batches that make one step together.")
]
Precision = Annotated[str, typer.Option(rich_help_panel=TRAINING, metavar="NAME", help="no, bf16 or fp16.")]

Teacher = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LOSS,
        metavar="NAME",
        help="original: the network before the cut teaches. none. Default: original for a RUN.",
    ),
]
Distill = Annotated[
    float, typer.Option(rich_help_panel=LOSS, metavar="F", help="Weight of the teacher's scores against the labels.")
]
Temperature = Annotated[float, typer.Option(rich_help_panel=LOSS, metavar="F", help="Of the teacher's scores.")]
Attention = Annotated[
    float,
    typer.Option(rich_help_panel=LOSS, metavar="F", help="Weight of attention transfer from the teacher; 0 for none."),
]
LabelSmoothing = Annotated[
    float, typer.Option(rich_help_panel=LOSS, metavar="F", help="Share of a label that is spread over all classes.")
]

EveryMinutes = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=KEEPING, metavar="F", help="Minutes between checkpoints within an epoch. Default: 10."
    ),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", rich_help_panel=KEEPING, help="Write TensorBoard events into --out.")
]
