"""Several processes that share the data: sums over all of them, and each one's share of the batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
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

    Every process has to call it with tensors of the same shapes, in the same order. Strided tensors, and tensors on a
    device that the process group does not serve (the CPU under NCCL, for example), travel as a copy.

    Example:
        >>> total = torch.tensor([float(len(batch))], dtype=torch.float64); all_sum(total)
    """
    if world() == 1:
        return
    for tensor in tensors:
        place = _place(tensor.device)
        if place == tensor.device and tensor.is_contiguous():
            dist.all_reduce(tensor)
        else:
            copy = tensor.to(place).contiguous()
            dist.all_reduce(copy)
            tensor.copy_(copy)


def _place(device: torch.device) -> torch.device:
    """Where the process group can sum a tensor of ``device``."""
    backend = str(dist.get_backend())
    if backend == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if backend == "gloo" and device.type not in ("cpu", "cuda"):
        return torch.device("cpu")
    return device


def share(items: Iterable[T]) -> Iterator[T]:
    """Every ``world()``-th item, beginning with the ``rank()``-th.

    Example:
        >>> attrim.recover.recalibrate(model, list(share(batches)))  # each process measures its own batches
    """
    return islice(iter(items), rank(), None, world())
