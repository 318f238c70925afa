"""hrank: how many independent patterns a channel's feature map holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap, Tap
from attrim.errors import CriterionError
from attrim.score.combine import reduced
from attrim.score.data import forward, stream, undisturbed
from attrim.score.gather import per_channel
from attrim.score.taps import KINDS, chosen_taps, used_twice, watching

__all__ = ["hrank"]


def hrank(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    *,
    reduction: str = "mean",
    tap: str = "act",
    fallback: Literal["energy", "error"] = "energy",
    samples: int | None = 500,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Mean over samples of the rank of a channel's feature map at the group's taps, then the reduction over taps.

    A map of shape (H, W) is a matrix; maps with more dimensions are flattened to (rest, W). The rank is numerical, with
    the tolerance of ``torch.linalg.matrix_rank``.

    Source: Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020 (500
    images). The tap after the activation, and the mean over the taps of a tied group, are our reading.

    Fallback ``energy``: a channel of a linear layer, of a token layout (N, T, C), of a 1-d signal, or with a map of one
    pixel has no matrix to take the rank of. A group that shows only such outputs is scored by the mean absolute
    activation. Ranks and energies are comparable only after normalisation within the group (the default).

    Args:
        reduction: across taps.
        tap: where to look: ``act`` (after the activation), ``norm``, ``conv``, ``linear`` or ``other``. A group without
            a tap of that kind is seen at the next kind in this order.
        fallback: ``error`` leaves groups without maps unscored.
        samples: stop after the batch that reaches this many samples; None goes through all data.
        progress: show progress when it takes longer than two seconds.

    Raises:
        CriterionError: NaN activations (the tap is named) or a wrong option.
    """
    if tap not in KINDS:
        raise CriterionError(f"tap: expected one of {', '.join(KINDS)}, found {tap!r}.")
    if fallback not in ("energy", "error"):
        raise CriterionError(f"fallback: expected energy or error, found {fallback!r}.")
    watched: dict[str, list[_MapSums]] | None = None
    hooks: dict[str, list[Callable[[Tensor], None]]] = {}
    with undisturbed(model), torch.no_grad():
        for batch in stream(model, batches, "hrank", samples=samples, show=progress):
            if watched is None:
                ambiguous = used_twice(model, channels, partial(forward, model, batch))
                taps = chosen_taps(channels, tap, ambiguous)
                watched = {group: [_MapSums(place, hooks) for place in places] for group, places in taps.items()}
            with watching(model, hooks):
                forward(model, batch)
    result: dict[str, Tensor] = {}
    for group, sums in (watched or {}).items():
        rows = [s.rank / s.maps for s in sums if s.maps]
        if not rows and fallback == "energy":
            rows = [s.energy / s.samples for s in sums if s.samples]
        if rows:
            result[group] = reduced(torch.stack(rows), reduction)
    return result


class _MapSums:
    """Running float64 sums of rank and mean absolute value of a tap's channels."""

    def __init__(self, tap: Tap, hooks: dict[str, list[Callable[[Tensor], None]]]) -> None:
        hooks.setdefault(tap.module, []).append(self.add)
        self._tap = tap
        self.rank = torch.zeros(len(tap.index), dtype=torch.float64)
        self.energy = torch.zeros(len(tap.index), dtype=torch.float64)
        self.maps = 0
        self.samples = 0

    def add(self, output: Tensor) -> None:
        """Take one output of the tap's module in."""
        maps = self._as_maps(output)
        energy = maps.flatten(2).abs().mean(2).sum(0).to("cpu", torch.float64)
        if not bool(energy.isfinite().all()):
            raise CriterionError(
                f"the activations of '{self._tap.module}' are NaN or infinite: look for NaN in the data or the weights."
            )
        self.energy += per_channel(energy, self._tap.index)
        self.samples += len(maps)
        if maps.ndim > 3 and min(maps.flatten(2, -2).shape[2:]) > 1:
            ranks = torch.linalg.matrix_rank(maps.flatten(2, -2)).sum(0).to("cpu", torch.float64)
            self.rank += per_channel(ranks, self._tap.index)
            self.maps += len(maps)

    def _as_maps(self, output: Tensor) -> Tensor:
        """Shape ``(samples, positions of the tap's dimension, map…)``, single or double precision."""
        dim = self._tap.dim % output.ndim
        batched = output.unsqueeze(0) if dim == 0 else output
        maps = batched.movedim(max(dim, 1), 1)
        maps = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
        return maps.unsqueeze(-1) if maps.ndim == 2 else maps
