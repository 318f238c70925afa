"""``attrim evaluate``: the accuracy of a network or of a pruned run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attrim.cli import options
from attrim.cli.inputs import image_shape, numbers, pick_device
from attrim.cli.models import build
from attrim.cli.screen import note, say
from attrim.cli.trace import input_of
from attrim.errors import InputError
from attrim.recover import evaluate as accuracy_of
from attrim.recover import open_data
from attrim.recover.data import Split
from attrim.ship import load

__all__ = ["evaluate"]


def evaluate(
    model: options.Model,
    data: Annotated[str, typer.Option(metavar="PATH", help="Labelled images, as for attrim prune.")],
    pruned: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of attrim prune: evaluate the pruned network in it.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="train, holdout or test. Default: test if there is one.")
    ] = None,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.NumClasses = None,
    input: options.Input = None,
    batch_size: options.BatchSize = 256,
    mean: options.Mean = None,
    std: options.Std = None,
    device: options.Device = "auto",
    debug: options.Debug = False,
) -> None:
    """Measure the top-1 accuracy of a network, or of a pruned one beside the class it came from.

    **Examples**

    ```
    attrim evaluate net.py:make --weights net.safetensors \\
        --input 1x3x32x32 --data data/cifar10
    attrim evaluate net.py:make --pruned runs/half \\
        --input 1x3x32x32 --data data/cifar10
    ```
    """
    if pruned is not None and (weights is not None or pretrained):
        raise InputError("--pruned brings its own weights. Leave out --weights and --pretrained.")
    name = model
    built = build(
        name, weights=None if weights is None else str(weights), pretrained=pretrained, num_classes=num_classes
    )
    network = built.model if pruned is None else load(pruned, model=built.model)
    if pruned is None and not built.trained:
        note("the weights are random: pass --weights FILE, --pretrained or --pruned DIR")
    images = open_data(
        data,
        shape=image_shape(input_of(name, built, input)),
        mean=built.mean if mean is None else numbers(mean, "--mean"),
        std=built.std if std is None else numbers(std, "--std"),
        batch_size=batch_size,
    )
    chosen = _split(split, images.splits)
    batches = images.batches(chosen)
    accuracy = accuracy_of(network.to(pick_device(device)), batches)
    say(f"{accuracy:.2%} top-1 on {len(images.rows(chosen)):,} images ({chosen} of {data})")


def _split(asked: str | None, there: tuple[Split, ...]) -> Split:
    if asked is None:
        return "test" if "test" in there else there[-1]
    for name in there:
        if name == asked:
            return name
    raise InputError(f"--split: the data have {', '.join(there)}, not '{asked}'.")
