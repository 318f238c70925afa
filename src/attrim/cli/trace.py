"""``attrim trace``: what can be pruned in a network, and why the rest cannot."""

from __future__ import annotations

from typing import Annotated

import typer

from attrim.cli import options
from attrim.cli.inputs import example, pick_device
from attrim.cli.models import Built, build
from attrim.cli.screen import say, show
from attrim.errors import InputError
from attrim.report.tables import branch_table, channel_table, pinned_table, sum_table
from attrim.trace import trace as find_channels

__all__ = ["input_of", "trace"]


def trace(
    model: options.Model,
    input: options.Input = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR", help="Say what happens to one tensor instead (repeatable)."),
    ] = None,
    weights: options.Weights = None,
    pretrained: options.Pretrained = False,
    num_classes: options.NumClasses = None,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Show the channel groups of a network, the residual branches that can be dropped, what must stay and why, and its costs.

    **Examples**

    ```
    attrim trace timm:resnet18
    attrim trace net.py:make --input 1x3x32x32
    attrim trace timm:resnet18 --explain layer2.0.conv1.weight
    ```
    """
    name = model
    built = build(
        name, weights=None if weights is None else str(weights), pretrained=pretrained, num_classes=num_classes
    )
    place = pick_device(device)
    shape = input_of(name, built, input)
    channels = find_channels(built.model.to(place), example(shape, place))
    if explain:
        for tensor in explain:
            say(channels.explain(tensor))
        return
    show(channel_table(channels))
    if channels.branches:
        show(branch_table(channels))
    if channels.sums:
        show(sum_table(channels))
    if channels.pinned:
        show(pinned_table(channels))
    say(f"{channels.cost.macs():,} MACs for an input of {shape}, {channels.cost.params():,} parameters")


def input_of(name: str, built: Built, given: str | None) -> str:
    """The ``--input`` text: what was typed, or what the model's library says.

    Raises:
        InputError: neither is there.
    """
    if given is not None:
        return given
    if built.input is None:
        raise InputError(f"'{name}' does not say what its input is. Give the shape, batch first: --input 1x3x32x32.")
    return "x".join(map(str, built.input))
