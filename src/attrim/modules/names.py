"""Names of a model's tensors, ties resolved, and the fingerprint that ties a plan to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["NamedTensors", "fingerprint", "named_tensors"]


@dataclass(frozen=True, slots=True, eq=False)
class NamedTensors:
    """Every parameter and buffer once, under its first name.

    Attributes:
        tensors: name -> tensor, parameters first, in registration order.
        parameters: the names that are parameters.
        aliases: other name of a tied tensor -> its first name.
    """

    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    aliases: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}


def named_tensors(model: nn.Module) -> NamedTensors:
    """Parameters and buffers of ``model`` with ties resolved by object identity."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    parameters = set()
    sources = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for is_buffer, source in enumerate(sources):
        for name, tensor in source:
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
                continue
            first[id(tensor)] = name
            tensors[name] = tensor
            if not is_buffer:
                parameters.add(name)
    return NamedTensors(tensors, frozenset(parameters), aliases)


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Sixteen hex digits that change with any tensor name or shape."""
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
