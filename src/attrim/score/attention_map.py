"""arpruning: how far the layer's attention map moves when a channel is left out of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap, Tap
from attrim.core.cost import IntArray
from attrim.errors import AttrimWarning, CriterionError
from attrim.score.combine import reduced
from attrim.score.data import forward, stream, undisturbed
from attrim.score.taps import chosen_taps, used_twice, watching
from attrim.score.weights import bn_scale, l1, l2

__all__ = ["arpruning", "left_out"]

Where = Literal["norm", "act", "conv"]
Scale = Literal["relative", "raw"]
Fallback = Literal["energy", "l1", "l2", "error"]
Combine = Literal["none", "bn_scale"]
POWERS = (1, 2, 4)

_CHUNK = 1 << 22
"""Activations taken in double precision at once."""


def arpruning(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    *,
    reduction: str = "mean",
    tap: Where = "norm",
    p: int = 2,
    scale: Scale = "relative",
    combine: Combine = "none",
    fallback: Fallback = "energy",
    samples: int | None = 640,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Leave-one-out change of the layer's normalised attention map, mean over images.

    With A of shape (B, C, H, W) at the tap, E_j = |A_j|^p and S = Σ_j E_j, flattened to H·W pixels, the attention map of
    an image is Q = S / ‖S‖, that without channel j is Q' = (S − E_j) / ‖S − E_j‖, and γ_j = mean ‖Q − Q'‖² / (H·W). A
    channel without which the map stays as it is is redundant. A channel that is zero everywhere scores exactly 0, one
    that is constant over the pixels next to it, even where it is large. Rescaling a layer changes nothing.

    Source: T. Yuan et al., ARPruning, Neural Networks 174, 2024, for a criterion from the attention map of each layer;
    the leave-one-out form is that of the first author's public code of 2021; the map itself is that of Zagoruyko &
    Komodakis, ICLR 2017. It is not confirmed against the paper's text. The closed form, sums over the positions of a
    channel, the relative scale and tied groups are ours.

    Args:
        reduction: across the taps of a group.
        tap: ``norm`` (output of the norm, before the activation), ``act`` or ``conv``. A group without a tap of that
            kind is seen at the next kind that it has.
        p: the power of the activations, 1, 2 or 4.
        scale: ``relative`` is g = γ·H·W·C², about 4 to 5 for independent noise of any width and map size, and so
            comparable between layers; ``raw`` is γ, which falls with the width and the size of the map.
        combine: ``bn_scale`` multiplies with the absolute scale of the norm; a group without one is not scored.
        fallback: for groups whose maps have one pixel (their γ is 0 by construction): ``energy`` (mean absolute
            activation), ``l1`` or ``l2`` of the weights, brought to the mean of the other groups; ``error`` leaves them
            unscored.
        samples: stop after the batch that reaches this many samples; None goes through all data.
        progress: show progress when it takes longer than two seconds.

    Warns:
        AttrimWarning: groups with maps of one pixel were scored by the fallback.

    Raises:
        CriterionError: NaN activations (the tap is named) or a wrong option.

    Example:
        >>> attrim.score(model, channels, "arpruning", loader, p=2, scale="relative")
    """
    _check(tap, p, scale, combine, fallback)
    taps: dict[str, tuple[Tap, ...]] | None = None
    maps: dict[tuple[str, int], _AttentionSums] = {}
    with undisturbed(model), torch.no_grad():
        for batch in stream(model, batches, "arpruning", samples=samples, show=progress):
            if taps is None:
                taps = chosen_taps(channels, tap, used_twice(model, channels, partial(forward, model, batch)))
                maps = _sums(taps, p)
            hooks: dict[str, list[Callable[[Tensor], None]]] = {}
            for (module, _), watched in maps.items():
                hooks.setdefault(module, []).append(watched.add)
            with watching(model, hooks):
                forward(model, batch)
    result: dict[str, Tensor] = {}
    flat: dict[str, Tensor] = {}
    for group, shown in (taps or {}).items():
        seen = [(maps[place.module, place.dim], place.index) for place in shown]
        rows = [watched.importance(index, scale) for watched, index in seen if watched.images]
        if rows:
            result[group] = reduced(torch.stack(rows), reduction)
        elif flat_rows := [watched.magnitude(index) for watched, index in seen if watched.samples]:
            flat[group] = reduced(torch.stack(flat_rows), reduction)
    if flat and fallback != "error":
        stand_in = flat if fallback == "energy" else {"l1": l1, "l2": l2}[fallback](model, channels)
        result |= _fall_back(result, {group: stand_in[group] for group in flat}, fallback)
    if combine == "bn_scale":
        scales = bn_scale(model, channels, reduction=reduction)
        result = {group: value * scales[group] for group, value in result.items() if group in scales}
    return result


def left_out(energy: Tensor) -> Tensor:
    """Squared distance of the normalised map of all units to the one without each unit, in closed form.

    With R = S − E_j the distance is 2 (1 − cos), cos between S and R, and 1 − cos = (‖E_j‖² ‖R‖² − ⟨E_j, R⟩²) /
    (‖S‖² ‖R‖² (1 + cos)): nothing cancels where cos is close to 1, as it is for most channels. An empty map counts as
    zero: its distance to any other is 1.

    Args:
        energy: shape (images, units, pixels), float64, not negative.

    Returns:
        shape (images, units), in [0, 2].
    """
    whole = energy.sum(1, keepdim=True)
    rest = _others(energy)
    n, n1 = energy.square().sum(2), rest.square().sum(2)
    n0 = whole.square().sum(2)
    sine = (n * n1 - (energy * rest).sum(2).square()).clamp_min_(0)
    product = n0 * n1
    along = torch.matmul(rest, whole.transpose(1, 2)).squeeze(2)
    distance = 2 * sine / (product + along * product.sqrt()).clamp_min(torch.finfo(energy.dtype).tiny)
    return torch.where(n1 <= 1e-30 * n0, (n0 > 0).to(distance), distance)


def _others(energy: Tensor) -> Tensor:
    """For every unit the sum over all others, without subtracting: exact also where one unit outweighs the rest."""
    rest = torch.zeros_like(energy)
    rest[:, 1:] = energy[:, :-1].cumsum(1)
    rest[:, :-1] += energy[:, 1:].flip(1).cumsum(1).flip(1)
    return rest


class _AttentionSums:
    """Running float64 sums of the leave-one-out distance over the images that one dimension of a module shows."""

    def __init__(self, module: str, dim: int, p: int) -> None:
        self._module, self._dim, self._p = module, dim, p
        self._merge: dict[int, int] = {}
        self.gamma: Tensor = torch.zeros(1, dtype=torch.float64)
        self.relative: Tensor = torch.zeros(1, dtype=torch.float64)
        self.energy: Tensor = torch.zeros(1, dtype=torch.float64)
        self.images = 0
        self.samples = 0

    def claim(self, index: IntArray) -> None:
        """The positions in a row of ``index``, shape (size, k), are one unit: they go together."""
        for first, others in zip(index[:, 0].tolist(), index[:, 1:].tolist(), strict=True):
            self._merge.update(dict.fromkeys(others, first))

    def add(self, output: Tensor) -> None:
        """Take one output of the module in."""
        maps = self._as_maps(output)
        if not len(maps):
            return
        step = max(1, _CHUNK // max(1, maps[0].numel()))
        for part in torch.split(maps, step):
            self._take(part.to(torch.float64).abs())

    def _take(self, size: Tensor) -> None:
        self.energy = self.energy + size.mean(2).sum(0).cpu()
        if not bool(self.energy.isfinite().all()):
            raise CriterionError(
                f"the activations of '{self._module}' are NaN or infinite: look for NaN in the data or the weights."
            )
        images, positions, pixels = size.shape
        self.samples += images
        if pixels == 1:
            return
        size /= size.amax((1, 2), keepdim=True).clamp_min_(torch.finfo(torch.float64).tiny)
        distance = left_out(self._units(size.pow_(self._p))).sum(0).cpu()
        self.gamma = self.gamma + distance / pixels
        self.relative = self.relative + distance * float(positions - len(self._merge)) ** 2
        self.images += images

    def importance(self, index: IntArray, scale: Scale) -> Tensor:
        """γ, or g, of each row of ``index``; shape (size,)."""
        total = self.gamma if scale == "raw" else self.relative
        return total[torch.from_numpy(np.ascontiguousarray(index[:, 0]))] / self.images

    def magnitude(self, index: IntArray) -> Tensor:
        """Mean absolute activation of each row of ``index``; shape (size,)."""
        return self.energy[torch.from_numpy(index)].sum(1) / self.samples

    def _units(self, energy: Tensor) -> Tensor:
        """Energies with the positions of one unit added up at its first; the others are left at zero."""
        if not self._merge:
            return energy
        unit = torch.arange(energy.shape[1], device=energy.device)
        unit[list(self._merge)] = torch.tensor(list(self._merge.values()), device=energy.device)
        return torch.zeros_like(energy).index_add_(1, unit, energy)

    def _as_maps(self, output: Tensor) -> Tensor:
        """Shape (samples, positions of the dimension, pixels); every other dimension is a pixel."""
        dim = self._dim % output.ndim
        batched = output.unsqueeze(0) if dim == 0 else output
        maps = batched.movedim(max(dim, 1), 1)
        return maps.unsqueeze(-1) if maps.ndim == 2 else maps.flatten(2)


def _sums(taps: Mapping[str, tuple[Tap, ...]], p: int) -> dict[tuple[str, int], _AttentionSums]:
    sums: dict[tuple[str, int], _AttentionSums] = {}
    for place in (place for shown in taps.values() for place in shown):
        key = (place.module, place.dim)
        sums.setdefault(key, _AttentionSums(*key, p)).claim(place.index)
    return sums


def _fall_back(scored: Mapping[str, Tensor], flat: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The stand-in's values, each group brought to the mean of the groups that have maps (1 where none has)."""
    level = float(torch.stack([v.mean() for v in scored.values()]).mean()) if scored else 1.0
    shown = ", ".join(list(flat)[:5]) + (f" and {len(flat) - 5} more" if len(flat) > 5 else "")
    warnings.warn(
        f"arpruning: the maps of {len(flat)} groups ({shown}) have one pixel, so leaving a channel out never changes them; "
        f"these groups are ranked by '{name}' instead. Choose another one with fallback=.",
        AttrimWarning,
        stacklevel=2,
    )
    return {g: level * v / (m if (m := float(v.mean())) > 0 else 1.0) for g, v in flat.items()}


def _check(tap: str, p: int, scale: str, combine: str, fallback: str) -> None:
    words = (
        ("tap", tap, Where),
        ("scale", scale, Scale),
        ("combine", combine, Combine),
        ("fallback", fallback, Fallback),
    )
    for name, found, kind in words:
        if found not in get_args(kind):
            raise CriterionError(f"{name}: expected one of {', '.join(get_args(kind))}, found {found!r}.")
    if isinstance(p, bool) or p not in POWERS:
        raise CriterionError(f"p: expected one of {', '.join(map(str, POWERS))}, found {p!r}.")
