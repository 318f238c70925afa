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
    taps: dict[str, tuple[Tap, ...]] | None = None
    sums: dict[tuple[str, int], _MapSums] = {}
    hooks: dict[str, list[Callable[[Tensor], None]]] = {}
    with undisturbed(model), torch.no_grad():
        for batch in stream(model, batches, "hrank", samples=samples, show=progress):
            if taps is None:
                taps = chosen_taps(channels, tap, used_twice(model, channels, partial(forward, model, batch)))
                places = dict.fromkeys((place.module, place.dim) for group in taps.values() for place in group)
                sums = {place: _MapSums(*place) for place in places}
                for (module, _), watched in sums.items():
                    hooks.setdefault(module, []).append(watched.add)
            with watching(model, hooks):
                forward(model, batch)
    result: dict[str, Tensor] = {}
    for group, shown in (taps or {}).items():
        seen = [(sums[place.module, place.dim], place.index) for place in shown]
        rows = [per_channel(s.rank / s.maps, index) for s, index in seen if s.maps]
        if not rows and fallback == "energy":
            rows = [per_channel(s.energy / s.samples, index) for s, index in seen if s.samples]
        if rows:
            result[group] = reduced(torch.stack(rows), reduction)
    return result


class _MapSums:
    """Running float64 sums of rank and mean absolute value along one dimension of a module's output."""

    def __init__(self, module: str, dim: int) -> None:
        self._module, self._dim = module, dim
        self.rank: Tensor = torch.zeros(1, dtype=torch.float64)
        self.energy: Tensor = torch.zeros(1, dtype=torch.float64)
        self.maps = 0
        self.samples = 0

    def add(self, output: Tensor) -> None:
        """Take one output of the module in."""
        maps = self._as_maps(output)
        energy = maps.flatten(2).abs().mean(2).sum(0).to("cpu", torch.float64)
        if not bool(energy.isfinite().all()):
            raise CriterionError(
                f"the activations of '{self._module}' are NaN or infinite: look for NaN in the data or the weights."
            )
        self.energy = self.energy + energy
        self.samples += len(maps)
        if maps.ndim > 3 and min(maps.flatten(2, -2).shape[2:]) > 1:
            ranks = torch.linalg.matrix_rank(maps.flatten(2, -2))
            self.rank = self.rank + ranks.sum(0).to("cpu", torch.float64)
            self.maps += len(maps)

    def _as_maps(self, output: Tensor) -> Tensor:
        """Shape ``(samples, positions of the dimension, map…)``, single or double precision."""
        dim = self._dim % output.ndim
        batched = output.unsqueeze(0) if dim == 0 else output
        maps = batched.movedim(max(dim, 1), 1)
        maps = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
        return maps.unsqueeze(-1) if maps.ndim == 2 else maps
