"""Several processes that share the data: sums over all of them, and each one's share of the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_sum", "rank", "share", "world"]

T = TypeVar("T")


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    """Number of processes; 1 without ``torch.distributed``."""
    return dist.get_world_size() if _active() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _active() else 0


def all_sum(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place; nothing happens in a single one.

    Every process has to call it with tensors of the same shapes, in the same order.
    """
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def share(items: Iterable[T]) -> Iterator[T]:
    """Every ``world()``-th item, beginning with the ``rank()``-th."""
    return islice(iter(items), rank(), None, world())
