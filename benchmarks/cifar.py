"""What the benchmarks on CIFAR-10 share: the data, the trained networks, and printing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from attrim.recover import open_data

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

INSIDE = ("conv1.*", "layer*.bn2.*")
"""Frozen: the residual streams."""

Pair = tuple[Tensor, Tensor]


def open_cifar(source: str, rows: int | None, **options: Any) -> Any:
    """CIFAR-10 from a source as ``attrim prune --data`` takes it, with at most so many training rows."""
    return open_data(source, shape=(3, 32, 32), mean=MEAN, std=STD, batch_size=128, limit=rows, **options)


def trained(network: str, checkpoints: Path) -> nn.Module:
    """A trained network of ``examples/cifar_resnet.py``, in eval mode."""
    model: nn.Module = untrained(network)
    model.load_state_dict(load_file(checkpoints / f"{network}-cifar10-jpeg.safetensors"))
    return model.eval()


def untrained(network: str) -> nn.Module:
    """The same network with fresh weights."""
    model: nn.Module = getattr(load_example("cifar_resnet"), network)()
    return model


def load_example(name: str) -> Any:
    """A module of the folder ``examples``."""
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its classes can be sent to other processes
    spec.loader.exec_module(module)
    return module


def first(batches: Any, count: int) -> Iterator[Pair]:
    """The first so many images, in batches."""
    seen = 0
    for x, y in batches:
        if seen >= count:
            return
        yield x[: count - seen], y[: count - seen]
        seen += len(x)


def say(*lines: object) -> None:
    """Print at once."""
    print(*lines, flush=True, file=sys.stdout)
