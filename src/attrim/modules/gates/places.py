"""Where gates hang: for each group the layers that produce its channels, and the module behind which each is gated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from attrim.core.channels import ChannelGroup, ChannelMap, Tap
from attrim.core.cost import IntArray
from attrim.errors import InputError
from attrim.modules.gates.observe import Observation, Reading, observe
from attrim.modules.select import input_dim, positions_of

__all__ = ["Place", "Plot", "Point", "Policy", "find_places"]

Point = Literal["post", "pre", "conv"]
Policy = Literal["internal", "tied", "input_select"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One gated output.

    Attributes:
        group: whose channels.
        source: path of the producing layer.
        chain: the modules that its output goes through up to the gate: the norm, the activation.
        dim, index: where the channels are in the output, as in :class:`attrim.Tap`.
        inputs: channels of the layer's input, 0 where unknown.
        input_dim: dimension of the layer's input that holds them.
        reading: who reads the gated tensor, or None where no run was watched.
        in_order: whether channel ``c`` is position ``c``.
        before: the gate hangs in front of ``source``, on its input, and ``dim`` counts from the end.
    """

    group: str
    source: str
    chain: tuple[str, ...]
    dim: int
    index: IntArray
    inputs: int
    input_dim: int
    reading: Reading | None
    in_order: bool
    before: bool = False

    @property
    def module(self) -> str:
        """Path of the module whose output (or input, with ``before``) is gated."""
        return self.chain[-1] if self.chain else self.source


@dataclass(frozen=True, slots=True, eq=False)
class Plot:
    """Which groups can be gated.

    Attributes:
        places: group -> its places, in the order in which the layers run.
        refused: group -> why it has none.
        streams: groups that several layers add up to (residual streams).
    """

    places: Mapping[str, tuple[Place, ...]]
    refused: Mapping[str, str]
    streams: frozenset[str]


def find_places(
    model: nn.Module,
    channels: ChannelMap,
    *,
    point: Point,
    groups: Collection[str] | None,
    policy: Policy,
    run: Callable[[], object] | None,
) -> Plot:
    """The places of all groups that ``policy`` allows.

    Args:
        model: the traced network.
        channels: its map.
        point: ``post``: behind the activation; ``pre``: behind the norm; ``conv``: behind the layer itself.
        groups: ids to choose from; None for all.
        policy: ``internal`` and ``input_select`` leave residual streams alone, ``tied`` takes them as well. What layers
            read of a stream that stays whole (:attr:`ChannelMap.inputs`) is gated under every policy.
        run: one forward pass to watch; without it the order of the modules tells what follows what.
    """
    modules = dict(model.named_modules())
    unknown = sorted(set(groups or ()) - set(channels.groups))
    if unknown:
        raise InputError(f"groups: {', '.join(unknown)} are no groups of this map; see list(channels.groups).")
    chosen = [g for g in channels if groups is None or g.id in groups]
    found: dict[str, list[Tap]] = {}
    refused: dict[str, str] = {}
    readers = {g.id: channels.inputs[g.id] for g in chosen if g.id in channels.inputs}
    for group in (g for g in chosen if g.id not in readers):
        taps, reason = _sources(group, channels, modules)
        if reason:
            refused[group.id] = reason
        else:
            found[group.id] = taps
    follow = _followers(channels, found, modules)
    for path in readers.values():
        follow.setdefault(path, set())
    seen = None if run is None else observe(model, {path: sorted(paths) for path, paths in follow.items()}, run)
    places: dict[str, tuple[Place, ...]] = {}
    streams = set()
    for id, taps in found.items():
        if _is_stream(taps, seen):
            streams.add(id)
            if policy != "tied":
                refused[id] = f"a residual stream: policy='{policy}' gates no streams (policy='tied' does)"
                continue
        if seen is not None and (silent := [t.module for t in taps if t.module not in seen.chains]):
            refused[id] = f"the module '{silent[0]}' was not called, or gives no tensor, so there is nothing to gate"
            continue
        places[id] = tuple(_place(channels[id], tap, point, modules, seen, len(taps) == 1, follow) for tap in taps)
    for id, path in readers.items():
        if seen is not None and path not in seen.chains:
            refused[id] = f"the module '{path}' was not called, or gives no tensor, so there is nothing to gate"
        else:
            places[id] = (_input_place(channels[id], path, modules[path]),)
    return Plot(places, refused, frozenset(streams))


def _sources(group: ChannelGroup, channels: ChannelMap, modules: Mapping[str, nn.Module]) -> tuple[list[Tap], str]:
    """Taps of the layers that produce the group's channels, or why they are not known."""
    taps = {tap.module: tap for tap in reversed(group.taps)}
    order = {tap.module: i for i, tap in reversed(list(enumerate(group.taps)))}
    owners: dict[str, str] = {}
    for member in group.with_role("out"):
        owner = member.axis.tensor.rpartition(".")[0].partition(".parametrizations")[0]
        if len(channels.shapes[member.axis.tensor]) > 1:
            owners.setdefault(owner, member.axis.tensor)
    if not owners:
        return [], "no layer produces its channels (they come from a parameter or an embedding that is used directly)"
    whole = {o for o in owners if not _grouped(modules.get(o))}
    if whole:
        owners = {o: t for o, t in owners.items() if o in whole}
    else:
        first = min(owners, key=lambda o: order.get(o, len(order)))
        owners = {first: owners[first]}
    for owner, tensor in owners.items():
        if owner not in taps:
            return (
                [],
                f"no module of its own shows what '{tensor}' produces (it is used directly, or by a fused operator)",
            )
        if taps[owner].dim == 0:
            return [], f"the channels of '{owner}' lie on the first dimension, which counts the samples"
    return sorted((taps[o] for o in owners), key=lambda tap: order[tap.module]), ""


def _grouped(module: nn.Module | None) -> bool:
    """A convolution in groups carries its input's channels on; they are produced elsewhere."""
    return isinstance(module, _ConvNd) and module.groups > 1


def _followers(
    channels: ChannelMap, found: Mapping[str, Sequence[Tap]], modules: Mapping[str, nn.Module]
) -> dict[str, set[str]]:
    """Source -> norms and activations that show every group of the source as the source does."""
    follow: dict[str, set[str]] = {}
    for id, sources in found.items():
        for source in sources:
            mine = {
                tap.module
                for tap in channels[id].taps
                if tap.kind in ("norm", "act") and _same(tap, source) and _fits(modules[tap.module], tap)
            }
            follow[source.module] = follow.get(source.module, mine) & mine
    return follow


def _same(one: Tap, other: Tap) -> bool:
    return one.dim == other.dim and np.array_equal(one.index, other.index)


def _fits(module: nn.Module, tap: Tap) -> bool:
    width = getattr(module, "num_features", getattr(module, "num_channels", None))
    return not isinstance(width, int) or width > int(tap.index.max())


def _is_stream(taps: Sequence[Tap], seen: Observation | None) -> bool:
    if len(taps) < 2:
        return False
    if seen is None:
        return True
    names = {tap.module for tap in taps}
    return any(pair <= names for pair in seen.sums)


def _place(
    group: ChannelGroup,
    tap: Tap,
    point: Point,
    modules: Mapping[str, nn.Module],
    seen: Observation | None,
    alone: bool,
    follow: Mapping[str, Collection[str]],
) -> Place:
    chain = _read_order(group, tap, alone, follow[tap.module]) if seen is None else seen.chains[tap.module]
    kinds = {t.module: t.kind for t in group.taps}
    norms = next((i for i, path in enumerate(chain) if kinds[path] != "norm"), len(chain))
    chain = chain[: {"conv": 0, "pre": min(norms, 1), "post": len(chain)}[point]]
    reading = None if seen is None else seen.readings.get((tap.module, len(chain)))
    inputs, dim = _inputs(modules[tap.module])
    in_order = np.array_equal(tap.index, np.arange(group.size)[:, None])
    return Place(group.id, tap.module, tuple(chain), tap.dim, tap.index, inputs, dim, reading, in_order)


def _input_place(group: ChannelGroup, path: str, module: nn.Module) -> Place:
    """In front of a layer that reads a stream."""
    member = group.members[0]
    index, read = member.index, positions_of(module)
    if read is not None:
        index = read.cpu().numpy()[index]
    inputs, dim = _inputs(module) if read is None else (0, 0)
    in_order = read is None and np.array_equal(index, np.arange(group.size)[:, None])
    reading = Reading({member.axis.tensor})
    return Place(group.id, path, (), input_dim(module), index, inputs, dim, reading, in_order, before=True)


def _read_order(group: ChannelGroup, tap: Tap, alone: bool, followers: Collection[str]) -> tuple[str, ...]:
    """Norm and activation that come right after the layer in the order of execution."""
    chain: list[str] = []
    start = next(i for i, t in enumerate(group.taps) if t.module == tap.module)
    for kind in ("norm", "act") if alone else ("norm",):
        after = start + 1 + len(chain)
        if after < len(group.taps) and group.taps[after].kind == kind and group.taps[after].module in followers:
            chain.append(group.taps[after].module)
    return tuple(chain)


def _inputs(module: nn.Module) -> tuple[int, int]:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        return module.in_channels, -1 - len(module.kernel_size)
    if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
        return module.in_features, -1
    return 0, 0
