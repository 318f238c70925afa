"""Latency: how long one forward pass takes, measured for several models in turn so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrim.errors import InputError
from attrim.modules.batches import device_of, to_device

__all__ = ["Latency", "compare_latency", "cpu_threads", "latency"]

_SHORTEST = 2e-3
"""Seconds that one sample should last; faster models are called several times per sample."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one forward pass, in milliseconds.

    Attributes:
        median: the figure to quote.
        minimum: the least disturbed sample.
        p90: nine of ten samples are at most this long.
        repeats: number of samples.
        threads: CPU threads in use.
        device: the model's device, such as ``cpu`` or ``cuda:0``.
    """

    median: float
    minimum: float
    p90: float
    repeats: int
    threads: int
    device: str


def latency(
    model: nn.Module, example_inputs: Any, *, repeats: int = 30, warmup: int = 5, threads: int | None = None
) -> Latency:
    """Time one forward pass of ``model`` in eval mode without gradients. See :func:`compare_latency`.

    Example:
        >>> latency(model, torch.randn(1, 3, 224, 224), threads=1).median
    """
    return compare_latency({"model": model}, example_inputs, repeats=repeats, warmup=warmup, threads=threads)["model"]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time one forward pass of each model, interleaved: every round times each model once, in alternating order.

    Models run in eval mode without gradients and get their modes back. Fast models are called several times per sample,
    the same number for all. On CUDA the samples are taken with events between synchronised ends.

    Args:
        models: name -> model; each on its own device.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword); moved to each model's device.
        repeats: samples per model, at least 1.
        warmup: calls of each model before the first sample, at least 1.
        threads: CPU threads during the measurement; None leaves them as they are.

    Returns:
        name -> :class:`Latency`, in milliseconds per forward pass of the given batch.

    Raises:
        InputError: no model, or a number out of its range.

    Example:
        >>> times = compare_latency({"before": model, "after": small}, torch.randn(1, 3, 224, 224), threads=1)
        >>> times["before"].median / times["after"].median      # speed-up
    """
    if not models:
        raise InputError("compare_latency: expected at least one model, found an empty mapping.")
    for name, value in (("repeats", repeats), ("warmup", warmup), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: expected an int >= 1, found {value!r}.")
    calls = {name: _call(model, example_inputs) for name, model in models.items()}
    clocks = {name: _clock(device_of(model)) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(cpu_threads(threads))
        for model in models.values():
            stack.enter_context(_eval_mode(model))
        for name, call in calls.items():
            clocks[name](call, warmup)
        inner = max(1, round(_SHORTEST / max(min(clocks[n](c, 2) / 2 for n, c in calls.items()), 1e-7)))
        order = list(models)
        for _ in range(repeats):
            for name in order:
                samples[name].append(clocks[name](calls[name], inner) / inner * 1e3)
            order.reverse()
        used = torch.get_num_threads()
    return {name: _summary(values, used, str(device_of(models[name]))) for name, values in samples.items()}


def _summary(values: list[float], threads: int, device: str) -> Latency:
    p90 = sorted(values)[min(len(values) - 1, int(0.9 * len(values)))]
    return Latency(statistics.median(values), min(values), p90, len(values), threads, device)


def _call(model: nn.Module, example_inputs: Any) -> Callable[[], object]:
    inputs = to_device(example_inputs, device_of(model))
    if isinstance(inputs, Mapping):
        return lambda: model(**inputs)
    if isinstance(inputs, tuple | list):
        return lambda: model(*inputs)
    return lambda: model(inputs)


def _clock(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """A function that runs a call a number of times and returns the seconds it took."""
    if device.type == "cuda":
        return lambda call, times: _time_cuda(call, times, device)
    wait: Callable[[], object] = _nothing if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)
    return lambda call, times: _time_host(call, times, wait)


def _time_cuda(call: Callable[[], object], times: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _time_host(call: Callable[[], object], times: int, wait: Callable[[], object]) -> float:
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return time.perf_counter() - begin


def _nothing() -> None:
    return None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` CPU threads inside the block; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
