"""The held-out samples, in an order of our own: those that networks disagree on come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from attrim.modules.batches import Batch

__all__ = ["HeldOut", "batches_for", "few", "small_enough"]

_CACHE, _FEWEST = 1 << 20, 8
"""Bytes of the largest activation in an evaluation on a processor, and the fewest samples; ResNet-56 ran 1.2 times as fast
on 16 images at a time as on 128."""


class HeldOut:
    """Batches that are held in memory.

    Args:
        batches: at least one.

    Attributes:
        batches: in the present order.
        order: position -> number of the sample in the order in which it came.
        movable: whether samples can be told apart in every tensor, so that they can be put in another order.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self.order = torch.arange(sum(b.size for b in batches))
        self.movable = _joined(batches) is not None

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.order.numel()

    def sort(self, clearness: Tensor) -> None:
        """Put the samples with the smallest values first; batches keep their sizes.

        Args:
            clearness: shape ``(samples,)``, in the order in which the samples came; how sure a network is of each.
        """
        joined = _joined([self.batches[i] for i in range(len(self.batches))]) if self.movable else None
        if joined is None or clearness.numel() != self.samples:
            return
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(self.samples)
        wanted = clearness.cpu().argsort(stable=True)
        places = torch.split(back[wanted], [b.size for b in self.batches])
        self.batches = [
            replace(b, **_part(joined, place.to(_device(joined))))
            for b, place in zip(self.batches, places, strict=True)
        ]
        self.order = wanted

    def arrived(self, values: Tensor) -> Tensor:
        """Values in the present order -> in the order in which the samples came; shape ``(samples, …)``."""
        if values.shape[0] != self.samples:
            return values
        found = torch.empty_like(values)
        found[self.order.to(values.device)] = values
        return found

    def present(self, values: Tensor) -> Tensor:
        """The other way round."""
        return values[self.order.to(values.device)] if values.shape[0] == self.samples else values


def few(batch: Batch, samples: int = 2) -> Batch:
    """The first samples of a batch, where every tensor holds one entry for each sample; otherwise the batch."""
    joined = _joined([batch])
    if joined is None or batch.size <= samples:
        return batch
    return replace(batch, size=samples, **_part(joined, torch.arange(samples, device=_device(joined))))


def small_enough(batches: Sequence[Batch], widest: float, device: torch.device) -> list[Batch]:
    """Parts whose activations fit into a processor's cache; other devices take batches as they come."""
    if device.type != "cpu":
        return list(batches)
    samples = max(_FEWEST, int(_CACHE / max(1.0, widest)))
    return [part for batch in batches for part in _divided(batch, samples)]


def batches_for(batches: Sequence[Batch], samples: float) -> int:
    """How many batches hold so many samples; at least one."""
    seen, number = 0, 0
    while seen < samples and number < len(batches):
        seen += batches[number].size
        number += 1
    return max(1, number)


def _divided(batch: Batch, samples: int) -> list[Batch]:
    """The batch in parts of so many samples, where every tensor holds one entry for each sample; otherwise as it is."""
    joined = _joined([batch])
    if joined is None or batch.size <= samples:
        return [batch]
    places = torch.split(torch.arange(batch.size, device=_device(joined)), samples)
    return [replace(batch, size=len(place), **_part(joined, place)) for place in places]


def _joined(batches: Sequence[Batch]) -> Mapping[str, Any] | None:
    """All batches as one, or None where that cannot be done."""
    flat, specs = zip(*(tree_flatten((b.args, dict(b.kwargs), b.labels)) for b in batches), strict=True)
    if any(spec != specs[0] for spec in specs):
        return None
    leaves = []
    for parts in zip(*flat, strict=True):
        if not isinstance(parts[0], Tensor):
            if any(part is not parts[0] and part != parts[0] for part in parts):
                return None
            leaves.append(parts[0])
            continue
        fits = all(p.ndim > 0 and p.shape[0] == b.size for p, b in zip(parts, batches, strict=True))
        if not fits or any(p.shape[1:] != parts[0].shape[1:] for p in parts):
            return None
        leaves.append(torch.cat(parts))
    args, kwargs, labels = tree_unflatten(leaves, specs[0])
    return {"args": args, "kwargs": kwargs, "labels": labels}


def _part(joined: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = tree_map_only(Tensor, lambda t: _like(t, t[index]), dict(joined))
    return found


def _like(old: Tensor, new: Tensor) -> Tensor:
    last = old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous()
    return new.contiguous(memory_format=torch.channels_last) if last else new


def _device(joined: Mapping[str, Any]) -> torch.device:
    return next(leaf.device for leaf in tree_flatten(dict(joined))[0] if isinstance(leaf, Tensor))
