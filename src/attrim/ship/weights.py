"""Weights as safetensors: a model's state dict in and out of one file, ties stored once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from attrim.core.plan import write_atomic
from attrim.errors import InputError

__all__ = ["Weights", "file_size", "fill", "load_weights", "read_weights", "save_weights"]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The content of a safetensors file.

    Attributes:
        tensors: name -> tensor, on the CPU.
        aliases: other name of a tied tensor -> the name that it is stored under.
        metadata: the strings stored beside the tensors.
        source: where they come from, for messages.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    source: str


def save_weights(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the state dict of ``model`` (parameters and persistent buffers) to one safetensors file, atomically.

    A tied tensor is stored once, and tensors that merely share memory are stored each in full. Memory formats become
    contiguous; values and dtypes are kept bit by bit.

    Raises:
        InputError: an entry of the state dict is not a plain tensor (``get_extra_state``, sparse, meta).

    Example:
        >>> save_weights(model, "model.safetensors")
    """
    tensors, aliases = _untie(model)
    notes = dict(metadata or {})
    if aliases:
        notes["aliases"] = json.dumps(aliases)
    write_atomic(Path(path), serialise(tensors, notes or None))


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a safetensors file.

    Raises:
        InputError: the file is missing, is not in safetensors format, or was cut short.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no weights file at '{path}': expected a .safetensors file. {_nearby(file)}")
    if file.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}:
        raise InputError(
            f"'{path}' looks like a pickle, which can run code when it is read. Convert it once: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"'{path}' is not a whole safetensors file ({error}). It may have been cut short while it was copied; "
            "copy or save it again."
        ) from error
    return Weights(tensors, json.loads(metadata.get("aliases", "{}")), metadata, f"'{path}'")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill ``model`` in place from a safetensors file; every tensor must be there and fit.

    Raises:
        InputError: the file cannot be read, or tensors are missing, unexpected or of another shape.

    Example:
        >>> model = MyNet(); load_weights(model, "model.safetensors")
    """
    fill(model, read_weights(path))


def fill(model: nn.Module, weights: Weights) -> None:
    """Copy ``weights`` into ``model`` in place, bit by bit: the model takes over the file's dtypes.

    Raises:
        InputError: tensors are missing, unexpected or of another shape; the first few are named.
    """
    own = _state(model)
    tensors = dict(weights.tensors)
    for alias, name in weights.aliases.items():
        if name in tensors and alias in own:
            tensors.setdefault(alias, tensors[name])
    tied: dict[tuple[object, ...], str] = {}
    for name, tensor in own.items():
        first = tied.setdefault(_identity(tensor), name)
        if first in tensors:
            tensors.setdefault(name, tensors[first])
    _compare(own, tensors, weights.source)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            raise InputError(
                "the model to fill is on the meta device. Build it on a real one, outside torch.device('meta')."
            )
    _take_dtypes(model, tensors)
    model.load_state_dict(tensors)


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file; for a folder, of the ``model.safetensors`` in it.

    Raises:
        InputError: there is no such file.
    """
    file = Path(path)
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"no file at '{file}' to measure.")
    return file.stat().st_size


def _take_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    live: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    live |= dict(model.named_buffers(remove_duplicate=False))
    other = [name for name in tensors if name in live and live[name].dtype != tensors[name].dtype]
    floats = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if other and len(floats) == 1:
        model.to(floats.pop())  # reaches the buffers that no file holds
    for name in other:
        live[name].data = live[name].data.to(tensors[name].dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"'{name}' in the state dict is a {type(value).__name__}, not a tensor, and cannot be stored without "
                "pickle. Return a tensor from get_extra_state, or remove it."
            )
    return state


def _untie(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in _state(model).items():
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = "has no values (meta device)" if tensor.is_meta else f"has the layout {tensor.layout}"
            raise InputError(f"cannot store '{name}': it {kind}. Expected a dense tensor with values.")
        stored = first.setdefault(_identity(tensor), name)
        if stored != name:
            aliases[name] = stored
            continue
        # a copy of its own memory: safetensors refuses tensors that overlap
        tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, aliases


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same view of the same memory; an empty tensor is only itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _compare(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} is {tuple(found[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    problems = [
        f"{text}: {_few(names)}"
        for text, names in (
            ("missing from the file", missing),
            ("not in the model", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"the weights in {source} do not fit the model. Tensors {'; tensors '.join(problems)}. "
            "Build the model with the arguments that it was trained with."
        )


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nearby(file: Path) -> str:
    found = sorted(p.name for p in file.parent.glob("*.safetensors")) if file.parent.is_dir() else []
    return f"Found there: {_few(found)}." if found else f"There is none in '{file.parent}'."
