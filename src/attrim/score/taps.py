"""Taps: watching the outputs of the modules that show a group's channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from attrim.core.channels import ChannelMap, Tap
from attrim.core.cost import IntArray
from attrim.errors import CriterionError

__all__ = ["KINDS", "chosen_taps", "used_twice", "watching"]

KINDS = ("act", "norm", "conv", "linear", "other")
"""Kinds of tap, in the order of preference."""


def chosen_taps(channels: ChannelMap, prefer: str, ambiguous: Set[str] = frozenset()) -> dict[str, tuple[Tap, ...]]:
    """For each group, its taps of the kind ``prefer``, or of the first kind in :data:`KINDS` that it has.

    Modules in ``ambiguous``, and modules that show different groups at the same positions, tell nothing about either
    and are left out. Groups without a usable tap are absent.
    """
    shared = _shown_twice(channels) | ambiguous
    result = {}
    for group in channels:
        taps = [tap for tap in group.taps if tap.module not in shared]
        for kind in (prefer, *KINDS):
            if found := tuple(tap for tap in taps if tap.kind == kind):
                result[group.id] = found
                break
    return result


def used_twice(model: nn.Module, channels: ChannelMap, run: Callable[[], object]) -> set[str]:
    """Modules without parameters that ``run`` (one forward pass) calls more than once: one ReLU object in two places.

    What such a module shows belongs to different groups. A module with parameters is fine: its calls share channels.
    """
    modules = dict(model.named_modules())
    paths = {tap.module for group in channels for tap in group.taps if tap.module in modules}
    calls = dict.fromkeys(paths, 0)

    def counter(path: str) -> Callable[[Tensor], None]:
        def count(output: Tensor) -> None:
            calls[path] += 1

        return count

    with watching(model, {path: [counter(path)] for path in paths}):
        run()
    return {path for path, n in calls.items() if n > 1 and next(modules[path].parameters(), None) is None}


def _shown_twice(channels: ChannelMap) -> set[str]:
    """Modules at which two groups claim the same position."""
    claims: dict[str, list[IntArray]] = {}
    for group in channels:
        mine: dict[str, list[IntArray]] = {}
        for tap in group.taps:
            mine.setdefault(tap.module, []).append(tap.index.ravel())
        for module, indices in mine.items():
            claims.setdefault(module, []).append(np.unique(np.concatenate(indices)))
    return {
        module
        for module, parts in claims.items()
        if len(np.unique(np.concatenate(parts))) < sum(len(part) for part in parts)
    }


@contextmanager
def watching(model: nn.Module, hooks: Mapping[str, Sequence[Callable[[Tensor], None]]]) -> Iterator[None]:
    """Call ``hooks[path]`` with every output tensor of the module at ``path``; the hooks are gone afterwards.

    Raises:
        CriterionError: the model has no module at one of the paths.
    """
    modules = dict(model.named_modules())
    handles = []
    try:
        for path, listeners in hooks.items():
            if path not in modules:
                raise CriterionError(
                    f"the channel map belongs to another model: there is no module '{path}'. "
                    "Trace this model: channels = attrim.trace(model, example_inputs)."
                )
            handles.append(modules[path].register_forward_hook(_relay(listeners)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relay(listeners: Sequence[Callable[[Tensor], None]]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            for listener in listeners:
                listener(output)

    return hook
