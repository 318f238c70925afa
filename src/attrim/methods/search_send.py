"""What worker processes are sent: tensors as plain arrays, and the files that classes come from."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attrim.methods.search_job import Ask

__all__ = ["Modules", "PackedAsk", "pack"]


@dataclass(frozen=True, slots=True, eq=False)
class _Array:
    """A tensor as bytes. Shared memory, which torch would use, is small in many containers, and needs a file each."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Array:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape), tensor.device)

    def tensor(self) -> Tensor:
        flat = torch.from_numpy(self.data.copy()).view(self.dtype)
        return flat.reshape(self.shape).to(self.device)


@dataclass(frozen=True, slots=True, eq=False)
class PackedAsk:
    """An :class:`Ask` without tensors in its network and batches."""

    shell: Ask
    weights: tuple[_Array, ...]

    def unpack(self) -> Ask:
        """The same as it was."""
        ask = self.shell
        for tensor, array in zip(_tensors(ask.model), self.weights, strict=True):
            tensor.data = array.tensor()
        calibration, holdout = (tree_map_only(_Array, _Array.tensor, list(b)) for b in (ask.calibration, ask.holdout))
        return replace(ask, calibration=calibration, holdout=holdout)


def pack(ask: Ask) -> PackedAsk:
    """Make ready to be sent; the network and the batches are copied."""
    model = copy.deepcopy(ask.model)
    weights = tuple(_Array.of(tensor) for tensor in _tensors(model))
    for tensor in _tensors(model):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
    calibration, holdout = (_packed(batches) for batches in (ask.calibration, ask.holdout))
    return PackedAsk(replace(ask, model=model, calibration=calibration, holdout=holdout), weights)


def _packed(batches: Sequence[Any]) -> list[Any]:
    packed: list[Any] = tree_map_only(Tensor, _Array.of, list(batches))
    return packed


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


class Modules:
    """Loads files as modules where it is unpickled: a network's class may come from a file that no import would find."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)

    @classmethod
    def behind(cls, things: Iterable[Any]) -> Modules:
        """The files of what these objects are instances of, or of the functions that they are."""
        files = {}
        for thing in things:
            name = getattr(thing if callable(thing) and hasattr(thing, "__name__") else type(thing), "__module__", "")
            module = sys.modules.get(name or "")
            file = getattr(module, "__file__", None)
            if file and name != "__main__" and "." not in name and PathFinder.find_spec(name) is None:
                files[name] = file
        return cls(files)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.files,)


def _load(files: Mapping[str, str]) -> Modules:
    for name, file in files.items():
        spec = importlib.util.spec_from_file_location(name, file)
        if name not in sys.modules and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    return Modules(files)
