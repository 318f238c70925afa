"""Which groups are residual streams, seen in a run, and the map in which layers choose what they read of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from attrim.core.channels import ChannelMap
from attrim.modules.batches import device_of, read_batch, run_batch
from attrim.modules.gates.gates import evaluating
from attrim.modules.gates.places import find_places
from attrim.modules.input_groups import input_groups

__all__ = ["stream_inputs"]


def stream_inputs(model: nn.Module, channels: ChannelMap, example: Any) -> ChannelMap:
    """:func:`attrim.modules.input_groups.input_groups` for what a run shows to be residual streams.

    Args:
        model: the traced network.
        channels: its map; not changed. One whose streams are gone already comes back as it is.
        example: a batch of any form that :func:`attrim.score` takes; one pass over it tells sums of branches from products.
    """
    batch = read_batch(example, device_of(model))
    with evaluating(model):
        plot = find_places(
            model, channels, point="conv", groups=None, policy="internal", run=lambda: run_batch(model, batch)
        )
    return input_groups(model, channels, [id for id in channels.groups if id in plot.streams])
