"""Descriptors of layers: the mean activation of each searched channel, read from the forward passes that train the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from attrim.methods.dcpa.widths import SearchSpace
from attrim.modules.gates.attach import channel_means
from attrim.modules.gates.places import Place

__all__ = ["Watched"]

_NOT_ACTIVE = (_NormBase, nn.GroupNorm, nn.LayerNorm, _ConvNd, nn.Linear)


class Watched:
    """Mean activations, behind the activation function and before any mask.

    Where the activation is no module of its own (``F.relu``), a ReLU is taken for it: straight behind a batch norm the mean
    would be nothing but the norm's bias.

    A group that several layers add up to, or that runs several times, has the mean over all of them.

    Args:
        places: group -> where its channels are seen.
        space: order of the result.

    Attributes:
        active: whether passes are read now.

    Example:
        >>> watched = Watched(places, space)
        >>> with watched.reading(model):
        ...     watched.active = True
        ...     model(images)
        >>> policy.observe(watched.take())
    """

    def __init__(self, places: Mapping[str, Sequence[Place]], space: SearchSpace) -> None:
        self.space, self.active = space, False
        self.places = [place for group in space.groups for place in places.get(group, ())]
        self._seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """A block in which forward passes are read; afterwards no hook is left."""
        modules = dict(model.named_modules())
        handles = []
        try:
            for place in self.places:
                follow = _Follow(place, self)
                paths = (place.source, *place.chain)
                handles += [modules[path].register_forward_hook(follow.hook(path)) for path in paths]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> Tensor:
        """The means of the passes since the last call, shape ``(channels,)``; NaN for groups that were not seen."""
        parts = []
        for group in self.space.groups:
            found = self._seen.get(group)
            size = self.space.channels[group].size
            parts.append(torch.stack(found).mean(0) if found else torch.full((size,), torch.nan))
        self._seen.clear()
        device = next((p.device for p in parts if p.device.type != "cpu"), torch.device("cpu"))
        return torch.cat([p.to(device) for p in parts])

    @torch.no_grad()
    def note(self, place: Place, module: nn.Module, x: Tensor) -> None:
        """Take in what came out of the last module of a place."""
        if isinstance(module, _NOT_ACTIVE):
            x = x.relu()
        self._seen.setdefault(place.group, []).append(channel_means(x.detach(), place).mean(0).float())


class _Follow:
    """Tells a layer's own output from those of others that go through the same (shared) activation module."""

    def __init__(self, place: Place, watched: Watched) -> None:
        self.place, self.watched = place, watched
        self.waiting: Any = None

    def hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        """What hangs on the module ``path``."""
        place = self.place

        def call(module: nn.Module, args: Any, out: Any) -> None:
            if not self.watched.active:
                return
            if path != place.source and (not args or args[0] is not self.waiting):
                return
            self.waiting = None if path == place.module else out
            if path == place.module and isinstance(out, Tensor):
                self.watched.note(place, module, out)

        return call
