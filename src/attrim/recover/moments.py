"""Mean and variance of all that batch norms see, from the statistics that they compute anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attrim.modules.distributed import all_sum

__all__ = ["Moments"]


class Moments:
    """Streaming mean and variance of the inputs of batch norms, exact over batches of any size.

    The layers run in train mode with momentum 1, so that their buffers hold the statistics of the last call; those are
    joined in float64, all layers at once. A layer that never ran keeps mean 0 and variance 1.

    Args:
        norms: batch norms with running statistics, all in train mode, momentum 1 and reset.

    Example:
        >>> with moments.watching():
        ...     model(images); moments.add()
        >>> moments.write()
    """

    def __init__(self, norms: Mapping[str, Any]) -> None:
        by_device: dict[torch.device, list[Any]] = {}
        for norm in norms.values():
            by_device.setdefault(norm.running_mean.device, []).append(norm)
        self._parts = [_Part(group, device) for device, group in by_device.items()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the values of each call, inside the block."""
        handles = [
            norm.register_forward_pre_hook(part.before, with_kwargs=True) for part in self._parts for norm in part.norms
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self) -> None:
        """Take in the calls of a forward pass; call it after each."""
        for part in self._parts:
            part.add()

    def forget(self) -> None:
        """Leave out the calls since the last :meth:`add`, of a forward pass that failed."""
        for part in self._parts:
            part.pending.clear()

    def sum_processes(self) -> None:
        """Join the statistics of all processes; each gets the same."""
        for part in self._parts:
            part.sum_processes()

    def write(self) -> None:
        """Put the statistics into the layers' buffers."""
        for part in self._parts:
            part.write()


class _Part:
    """The layers on one device.

    Their channels lie one after the other in flat float64 vectors: ``count`` values so far, their ``mean``, and the
    ``spread``, the sum of squared distances from it.
    """

    def __init__(self, norms: list[Any], device: torch.device) -> None:
        self.norms = norms
        self.pending: dict[int, int] = {}  # layer -> values per channel of its last call
        self._number = {id(norm): i for i, norm in enumerate(norms)}
        self._widths = [int(norm.running_mean.numel()) for norm in norms]
        self._starts = [sum(self._widths[:i]) for i in range(len(norms))]
        self._device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        self._count, self._mean, self._spread = torch.zeros(
            3, sum(self._widths), dtype=torch.float64, device=self._device
        ).unbind()
        self._calls = [0] * len(norms)
        self._known: dict[tuple[tuple[int, int], ...], tuple[Tensor, Tensor]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call; a layer that runs again takes in its last call first, before the buffers are overwritten."""
        number = self._number[id(module)]
        if number in self.pending:
            self.add()
        values = args[0] if args else next(iter(kwargs.values()))
        self.pending[number] = values.numel() // values.shape[1]

    def add(self) -> None:
        """Join the pending calls with what was there (Chan et al., equation 2.1)."""
        if not self.pending:
            return
        where, new = self._layout(tuple(self.pending.items()))
        mean, variance = (
            torch.cat([getattr(self.norms[i], name) for i in self.pending]).to(self._device, torch.float64)
            for name in ("running_mean", "running_var")
        )
        old = self._count[where]
        total = old + new
        distance = mean - self._mean[where]
        self._mean[where] += distance * (new / total)
        self._spread[where] += variance * (new - 1) + distance.square() * (old * new / total)
        self._count[where] = total
        for number in self.pending:
            self._calls[number] += 1
        self.pending.clear()

    def _layout(self, calls: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """Places of the channels of the pending layers, and the values of each channel."""
        if calls not in self._known:
            if len(self._known) > 64:  # every batch of another size
                self._known.clear()
            spans = [torch.arange(self._starts[i], self._starts[i] + self._widths[i]) for i, _ in calls]
            new = [torch.full((self._widths[i],), float(count), dtype=torch.float64) for i, count in calls]
            self._known[calls] = torch.cat(spans).to(self._device), torch.cat(new).to(self._device)
        return self._known[calls]

    def sum_processes(self) -> None:
        calls = torch.tensor(self._calls, dtype=torch.float64, device=self._device)
        total, mean = self._count.clone(), self._count * self._mean
        all_sum(calls, total, mean)
        mean = mean / total.clamp(min=1)
        self._spread += self._count * (self._mean - mean).square()
        all_sum(self._spread)
        self._count, self._mean = total, mean
        self._calls = [int(n) for n in calls.tolist()]

    @torch.no_grad()
    def write(self) -> None:
        variance = self._spread / (self._count - 1).clamp(min=1)
        for norm, begin, width, calls in zip(self.norms, self._starts, self._widths, self._calls, strict=True):
            span = slice(begin, begin + width)
            norm.reset_running_stats()
            if calls:
                norm.running_mean.copy_(self._mean[span])
                norm.running_var.copy_(variance[span])
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(calls)
