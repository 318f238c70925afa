"""Batches: what a data source yields, taken apart into the model's inputs and the labels."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrim.errors import DataError

__all__ = ["LABEL_KEYS", "Batch", "batch_source", "device_of", "logits_of", "read_batch", "run_batch", "to_device"]

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Entries of a dict batch that are labels; all others are inputs of the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch, ready for the model.

    Attributes:
        args: positional inputs of the model.
        kwargs: keyword inputs of the model.
        labels: what the outputs are compared with, or None.
        size: number of samples: the length of the first input tensor.
        raw: the batch as the source gave it, moved to the model's device.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Any
    size: int
    raw: Any


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer, the CPU if it has none."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it (in tuples, lists and dicts too) on ``device``; NumPy arrays become tensors."""
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def batch_source(batches: Any) -> Iterable[Any]:
    """``batches`` itself, after checking that going through it yields batches.

    Raises:
        DataError: it cannot be iterated, or it is itself one batch (a tensor, a dict, an ``(x, y)`` pair).
    """
    looks_like = ""
    if isinstance(batches, Tensor | np.ndarray):
        looks_like = f"one tensor of shape {tuple(batches.shape)}"
    elif isinstance(batches, Mapping):
        looks_like = f"one dict with the keys {', '.join(map(str, list(batches)[:5]))}"
    elif _is_pair(batches):
        looks_like = "one (inputs, labels) pair"
    elif isinstance(batches, str) or not isinstance(batches, Iterable):
        raise DataError(
            "batches: expected an iterable of batches (a DataLoader, a list, a generator), found "
            f"{type(batches).__name__}."
        )
    if looks_like:
        raise DataError(f"batches: expected an iterable of batches, found {looks_like}. Put it in a list: [batch].")
    iterable: Iterable[Any] = batches
    return iterable


def _is_pair(value: Any) -> bool:
    """Whether a tuple of two is a batch and not two batches: class labels are a vector of integers."""
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(v, Tensor) for v in value):
        return False
    labels: Tensor = value[1]
    return labels.ndim <= 1 and not labels.is_floating_point() and value[0].shape != labels.shape


def read_batch(batch: Any, device: torch.device) -> Batch:
    """Take a batch apart and move it to ``device``.

    * a tensor: the model's only input, no labels;
    * a tuple or list: the last entry holds the labels, those before it are positional inputs; ``(x,)`` has no labels.
      An input that is itself a tuple or a dict is spread over the model's arguments: ``((a, b), labels)``;
    * a dict: the entries named in :data:`LABEL_KEYS` are labels, the others are keyword inputs.

    Raises:
        DataError: the batch has none of these forms, or no tensor among its inputs.

    Example:
        >>> read_batch((torch.zeros(4, 3), torch.zeros(4)), torch.device("cpu")).size
        4
    """
    raw = to_device(batch, device)
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    labels: Any = None
    if isinstance(raw, Tensor):
        args = (raw,)
    elif isinstance(raw, Mapping):
        labels = next((raw[key] for key in LABEL_KEYS if key in raw), None)
        args, kwargs = (), {str(key): value for key, value in raw.items() if key not in LABEL_KEYS}
    elif isinstance(raw, list | tuple) and raw:
        inputs, labels = (list(raw[:-1]), raw[-1]) if len(raw) > 1 else (list(raw), None)
        only = inputs[0] if len(inputs) == 1 else None
        args = tuple(only if isinstance(only, list | tuple) else inputs)
        if isinstance(only, Mapping):
            args, kwargs = (), {str(key): value for key, value in only.items()}
    else:
        raise DataError(
            "expected a batch (a tensor, an (inputs, labels) tuple or a dict of tensors), found "
            f"{type(batch).__name__}."
        )
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if first is None:
        raise DataError(f"expected a tensor among the inputs of a batch, found {_outline(raw)}.")
    return Batch(args, kwargs, labels, int(first.shape[0]) if first.ndim else 1, raw)


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs on ``batch``.

    A dict batch with one input goes in by position when the model's ``forward`` has no argument of that name: data
    sets say ``image``, models say ``x``.
    """
    if len(batch.kwargs) == 1 and not batch.args:
        ((name, value),) = batch.kwargs.items()
        if not _takes(model, name):
            return model(value)
    return model(*batch.args, **batch.kwargs)


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def logits_of(outputs: Any) -> Tensor:
    """The tensor of class scores in a model's outputs: the tensor, ``outputs.logits``, or the first of a tuple.

    Raises:
        DataError: there is no such tensor.
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits", outputs.get("out"))
    elif hasattr(outputs, "logits"):
        found = outputs.logits
    elif isinstance(outputs, list | tuple) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"expected class scores (a tensor, a tuple that starts with one, or .logits) from the model, found "
            f"{_outline(outputs)}. Pass your own loss: loss=lambda outputs, batch: ..."
        )
    return found


def _outline(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, list(value)[:5])) or '(none)'}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value[:5]) or 'nothing'}"
    return type(value).__name__
