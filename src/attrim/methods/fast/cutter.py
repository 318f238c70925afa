"""Candidates as networks: cut to their widths, all sharing the tensors that no cut touches."""

from __future__ import annotations

import torch
from torch import nn

from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.search.decide import plan_from_kept
from attrim.search.space import Point
from attrim.surgery.cut import apply

__all__ = ["Cutter"]


class Cutter:
    """Cuts a network to kept counts.

    Args:
        model: not changed.
        channels: its map.
        scores: those channels of a group stay that score highest.
        layout: memory format of what is cut.
    """

    def __init__(self, model: nn.Module, channels: ChannelMap, scores: Scores, layout: torch.memory_format) -> None:
        self.model, self.channels, self._format = model, channels, layout
        self._orders = {
            group: values.argsort(descending=True, stable=True).tolist() for group, values in scores.values.items()
        }

    def network(self, point: Point) -> nn.Module:
        """The network with these counts, in the order of ``channels.cost.groups``.

        Raises:
            InputError: a group without scores that is not whole.
        """
        groups, sizes = self.channels.cost.groups, self.channels.cost.sizes
        kept: dict[str, list[int]] = {}
        for group, count, size in zip(groups, point, sizes.tolist(), strict=True):
            if count == size:
                continue
            if group not in self._orders:
                raise InputError(f"group '{group}' has no scores, so it stays whole; found {count} of {size} channels.")
            kept[group] = sorted(self._orders[group][:count])
        network = apply(self.model, plan_from_kept(self.channels, kept), share=True)
        return network.to(memory_format=self._format)
