"""Keeps a training run: when to write a checkpoint, which process does it, and whether one may be continued."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import AttrimWarning, CheckpointError
from attrim.recover.checkpoint import Checkpoints
from attrim.recover.engine import Engine
from attrim.recover.recipe import Recipe

__all__ = ["Keeper", "fill_tensors", "tensors_of", "weights_digest"]


class Keeper:
    """The checkpoints of a run, or nothing where the recipe names no folder. Only the main process reads and writes.

    Args:
        recipe: names the folder and how often.
        engine: the processes of the run.
    """

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        self.recipe, self.engine = recipe, engine
        self._store = None if recipe.folder is None else Checkpoints(recipe.folder)
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the main process wants to write now."""
        return self._store is not None and self.engine.main and self._minutes() >= self.recipe.minutes

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint, or nothing."""
        files = [] if self._store is None else self._store.files()
        return f" The last good checkpoint is '{files[0]}'." if files else ""

    def save(self, done: int, state: Callable[[], dict[str, Any]], own: Any) -> None:
        """Write a checkpoint; every process takes part.

        Args:
            done: batches since the beginning of the run.
            state: makes the values that all processes share; called in the main process.
            own: what each process has for itself: its random state.

        Raises:
            CheckpointError: it cannot be written, in every process.
        """
        self._written = time.monotonic()
        if self._store is None:
            return
        each, failed = self.engine.gather(own), None
        if self.engine.main:
            try:
                self._store.write(done, {**state(), "each": each})
            except CheckpointError as error:
                failed = error
        failed = self.engine.from_main(failed)
        if failed is not None:
            raise failed

    def take_up(self, identity: Callable[[], dict[str, Any]], network: nn.Module) -> dict[str, Any] | None:
        """The state to go on from, in every process; None to begin.

        Raises:
            CheckpointError: the folder holds a run and ``resume`` was not asked for, or the checkpoint belongs to
                another recipe or model (the differences are named).
        """
        self._written = time.monotonic()
        if self._store is None:
            return None
        found: Any = None
        if self.engine.main:
            try:
                found = self._find(identity, network)
            except CheckpointError as error:
                found = error
        found = self.engine.from_main(found)
        if isinstance(found, CheckpointError):
            raise found
        if found is not None and len(found["each"]) != self.engine.world:
            warnings.warn(
                f"the checkpoint was written by {len(found['each'])} processes and is continued by {self.engine.world}: "
                "the result will be as good, not bitwise the same.",
                AttrimWarning,
                stacklevel=2,
            )
        return found if found is None else dict(found)

    def _find(self, identity: Callable[[], dict[str, Any]], network: nn.Module) -> dict[str, Any] | None:
        if self._store is None:
            return None
        if not self.recipe.resume:
            if self._store.files():
                raise CheckpointError(
                    f"'{self.recipe.folder}' holds the checkpoints of an earlier run. Pass resume=True to go on with it, "
                    "or choose another folder."
                )
            return None
        read = self._store.read()
        if read is None:
            return None
        state, path = read
        _compare(identity(), state["identity"], tensors_of(network), state["model"], str(path))
        return state

    def _minutes(self) -> float:
        return (time.monotonic() - self._written) / 60


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not persistent too; a tied one once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def fill_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module of the same names and shapes."""
    for name, tensor in tensors_of(module).items():
        tensor.copy_(values[name])


def weights_digest(module: nn.Module) -> str:
    """A short text that two networks share only when all their tensors are equal."""
    total = 0
    for name, tensor in tensors_of(module).items():
        total = zlib.crc32(name.encode(), total)
        if tensor.numel():
            flat = tensor.detach().to("cpu", memory_format=torch.contiguous_format).reshape(-1)
            total = zlib.crc32(flat.view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _compare(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    own: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    path: str,
) -> None:
    names = [name for name in {**own, **stored} if _shape(own, name) != _shape(stored, name)]
    if names:
        raise CheckpointError(
            f"the checkpoint '{path}' belongs to another model: '{names[0]}' is {_shape(stored, names[0])} there and "
            f"{_shape(own, names[0])} here. Pass the model of the first call, or start anew in another folder."
        )
    differences = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differences:
        settings = [n for n in differences if not n.startswith("weights")] or differences
        there = ", ".join(f"{name}={theirs.get(name)!r}" for name in settings)
        here = ", ".join(f"{name}={ours.get(name)!r}" for name in settings)
        raise CheckpointError(
            f"the checkpoint '{path}' belongs to another run: it was made with {there}, found {here}. Pass the same "
            "model, teacher, data and settings as in the first call, or start anew in another folder."
        )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"
