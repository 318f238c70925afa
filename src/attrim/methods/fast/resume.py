"""Keeping what modules give in one run, and handing it out in another instead of running them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attrim.methods.fast.boundary import Boundary
from attrim.methods.fast.recording import Key

__all__ = ["Enough", "Kept", "Outputs", "Shape", "keeping", "resuming"]


class Enough(BaseException):
    """Ends a forward pass whose outputs are all kept; no error, and nothing that a network should catch."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Stands for a tensor that nothing depends on."""

    size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Any tensor like it."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


Kept = dict[Key, Any]
"""Call -> its output, with tensors or :class:`Shape` in it; for one batch."""


class Outputs(Protocol):
    """What was kept of each batch, by number."""

    def __getitem__(self, number: int, /) -> Kept:
        """Of one batch."""


@contextmanager
def keeping(
    modules: Mapping[str, nn.Module],
    wanted: Collection[Key],
    shapes: Collection[Key],
    fragile: Collection[Key],
    where: Boundary | None,
    kept: Kept,
    enough: bool = False,
) -> Iterator[None]:
    """Keep the outputs of the calls ``wanted``, and the shapes alone of those in ``shapes``, of one forward pass.

    Args:
        modules: by path, of what runs inside.
        wanted, shapes: calls.
        fragile: calls whose outputs are copied, because they are changed in place later on.
        where: the boundary at which the pass is taken up, None for a whole one.
        kept: filled.
        enough: whether the pass ends once everything is kept.

    Raises:
        Enough: when it does.
    """
    paths = {path for path, _ in (*wanted, *shapes)}
    missing = {*wanted, *shapes}.difference(kept)
    handles: list[Any] = []

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        numbers: Iterator[int] = count() if where is None else iter(where.invoked.get(path, ()))

        def note(module: nn.Module, args: Any, out: Any) -> None:
            key = (path, next(numbers))
            if key in kept:  # of the run before, to which this one goes back
                return
            if key in wanted:
                kept[key] = tree_map_only(Tensor, torch.clone if key in fragile else torch.detach, out)
            elif key in shapes:
                kept[key] = tree_map_only(Tensor, _shape, out)
            missing.discard(key)
            if enough and not missing:
                raise Enough

        return note

    try:
        handles += [modules[path].register_forward_hook(hook(path)) for path in paths]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resuming(modules: Mapping[str, nn.Module], where: Boundary, kept: Mapping[Key, Any]) -> Iterator[None]:
    """Inside, one forward pass of the network with these modules begins at the boundary: skipped calls hand out what was kept."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for path in where.stubbed:
            module = modules[path]
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _stub(module.forward, path, where, kept)
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _stub(original: Callable[..., Any], path: str, where: Boundary, kept: Mapping[Key, Any]) -> Callable[..., Any]:
    remaining = iter(where.invoked[path])

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = (path, next(remaining))
        if key not in where.skipped:
            return original(*args, **kwargs)
        out = kept[key]
        if isinstance(out, Tensor):
            return out.clone() if key in where.cloned else out
        out = tree_map_only(Shape, Shape.empty, out)
        return tree_map_only(Tensor, torch.clone, out) if key in where.cloned else out

    return forward


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tensor.dtype, tensor.device)
