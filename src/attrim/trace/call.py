"""One operator call as the rules see it: arguments by schema name, tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

__all__ = ["Call", "tensors_in"]


@dataclass(slots=True)
class Call:
    """An ATen call.

    Attributes:
        func: the operator overload.
        name: its base name, without namespace, overload and the underscore of in-place variants.
        args, kwargs: as dispatched.
        out: what it returned.
    """

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any = None

    def __getitem__(self, argument: str) -> Any:
        """An argument by its schema name, with the schema's default."""
        if argument in self.kwargs:
            return self.kwargs[argument]
        for position, (name, default) in enumerate(_arguments(self.func)):
            if name == argument:
                return self.args[position] if position < len(self.args) else default
        raise KeyError(argument)

    def has(self, argument: str) -> bool:
        return any(name == argument for name, _ in _arguments(self.func))

    @property
    def inputs(self) -> list[Tensor]:
        return tensors_in((self.args, self.kwargs))

    @property
    def outputs(self) -> list[Tensor]:
        return tensors_in(self.out)


@lru_cache(maxsize=4096)
def _arguments(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for item in value:
            if item is not None:
                found += tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            found += tensors_in(item)
    return found
