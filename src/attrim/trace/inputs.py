"""Example inputs at the door, and tensors inside whatever a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attrim.errors import InputError, TraceError

__all__ = ["Example", "check_model", "example_of", "map_tensors", "outputs_of"]


class Example(NamedTuple):
    """Positional and keyword arguments of one forward call."""

    args: Any
    kwargs: Any


def example_of(example_inputs: Any) -> Example:
    """A tensor is one positional argument, a tuple or list several, a mapping the keyword arguments.

    Raises:
        InputError: anything else, or no tensor inside.
    """
    if isinstance(example_inputs, Tensor):
        example = Example((example_inputs,), {})
    elif isinstance(example_inputs, (tuple, list)):
        example = Example(tuple(example_inputs), {})
    elif isinstance(example_inputs, Mapping):
        example = Example((), dict(example_inputs))
    else:
        raise InputError(
            f"example_inputs: expected a tensor, a tuple (positional arguments) or a dict (keyword arguments), found "
            f"{type(example_inputs).__name__}. For an image network: torch.randn(1, 3, 224, 224)."
        )
    if not outputs_of((example.args, example.kwargs), required=False):
        raise InputError(
            "example_inputs: expected at least one tensor, found none. For example torch.randn(1, 3, 224, 224)."
        )
    return example


def check_model(model: Any) -> None:
    """Refuse what cannot be pruned, with the call that mends it.

    Raises:
        InputError: not a module, a wrapper around the model, no parameters, half precision on the CPU, NaN weights.
    """
    if not isinstance(model, nn.Module):
        hint = " Call the class to make an instance." if isinstance(model, type) else ""
        raise InputError(f"model: expected a torch.nn.Module, found {model if hint else type(model).__name__}.{hint}")
    if hasattr(model, "_orig_mod"):
        raise InputError("model: found a compiled model. Pass the model before torch.compile: model._orig_mod.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"model: found a {type(model).__name__} wrapper. Pass the model inside: model.module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "model: found a TorchScript model, whose operators carry no modules. Pass the nn.Module it was made from."
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise InputError(f"model: {type(model).__name__} has no parameters, so there is nothing to prune.")
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"model: parameter '{name}' is not initialised. Run one forward pass of the lazy modules first."
            )
        if parameter.dtype == torch.float16 and parameter.device.type == "cpu":
            raise InputError(
                f"model: parameter '{name}' is float16 on the CPU, where half precision cannot be verified. "
                "Prune in single precision and convert afterwards: model.float(), then small.half()."
            )
        if parameter.is_floating_point() and parameter.device.type != "meta" and not _finite(parameter):
            raise InputError(
                f"model: parameter '{name}' holds NaN or infinite values; no criterion can rank them. "
                "Load a good checkpoint: [n for n, p in model.named_parameters() if not p.isfinite().all()] lists the bad ones."
            )

    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and torch.isnan(buffer).any():
            raise InputError(
                f"model: buffer '{name}' holds NaN values. Load a good checkpoint, or reset the statistics."
            )


def _finite(parameter: Tensor) -> bool:
    # a finite sum proves finite terms, in one pass without a mask; an overflow falls back to the exact test
    return bool(torch.isfinite(parameter.detach().sum())) or bool(torch.isfinite(parameter.detach()).all())


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested structure with every tensor replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def outputs_of(value: Any, required: bool = True) -> list[Tensor]:
    """All tensors in a model's result: nested tuples, lists, mappings, dataclasses and plain objects.

    Raises:
        TraceError: there is none (and ``required``).
    """
    found: list[Tensor] = []
    _collect(value, found, 0)
    if required and not found:
        raise TraceError(
            f"the model returned {type(value).__name__} without a tensor that attrim can see. Return tensors, or a tuple, "
            "list, dict or dataclass of tensors."
        )
    return found


def _collect(value: Any, found: list[Tensor], depth: int) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif depth > 8:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name), found, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for item in vars(value).values():
            _collect(item, found, depth + 1)
