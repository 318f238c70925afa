"""Random states: a run's own streams for the data and for the model, and the caller's state as it was afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["Stream", "own_randomness", "random_state", "restore_random_state", "seed_all"]

_LARGE = 2**32


def seed_all(seed: int, device: torch.device) -> None:
    """Seed torch (and the CUDA device in use), NumPy's global generator and Python's ``random``."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % _LARGE)  # noqa: NPY002 - user code and timm draw from it
    random.seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators, as plain values and tensors that a checkpoint can hold.

    Example:
        >>> state = random_state(torch.device("cpu")); restore_random_state(state, torch.device("cpu"))
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Take up what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block everything random starts from ``seed``; afterwards the caller's states are as before."""
    before = random_state(device)
    seed_all(seed, device)
    try:
        yield
    finally:
        restore_random_state(before, device)


class Stream:
    """A random stream of its own: what is drawn inside :meth:`use` does not move the others.

    The data have one, so that the order and augmentation of an epoch follow from seed and epoch alone, whatever dropout
    drew in between: a run can then begin in the middle, and every process sees the same batches.
    """

    def __init__(self) -> None:
        self._cpu = torch.device("cpu")
        self._state = random_state(self._cpu)

    def seed(self, seed: int) -> None:
        """Begin anew from a seed."""
        with self.use():
            seed_all(seed, self._cpu)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Draw from this stream inside the block."""
        before = random_state(self._cpu)
        restore_random_state(self._state, self._cpu)
        try:
            yield
        finally:
            self._state = random_state(self._cpu)
            restore_random_state(before, self._cpu)
