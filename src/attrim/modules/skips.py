"""What stands in the place of removed modules: zeros of the right shape, without parameters and without MACs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.branches import Extent, Replacement
from attrim.errors import PlanError, SurgeryError
from attrim.modules.names import named_tensors
from attrim.modules.skeleton import copy_with

__all__ = ["Like", "Zeros", "stand_in_for", "without_modules"]


def _first_tensor(values: Any) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)):
            found = _first_tensor(value)
            if found is not None:
                return found
    return None


class _StandIn(nn.Module):
    """Returns zeros whatever it is called with; a tuple with None elsewhere if the removed module returned one."""

    def __init__(self, returns: tuple[int, int] | None) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of a shape that follows the first tensor among the arguments."""
        given = _first_tensor((*args, *kwargs.values()))
        if given is None:
            raise SurgeryError(
                "a module in the place of a removed one was called without a tensor, so the shape of its zeros is unknown. "
                "Verify the plan: attrim.verify(model, small, plan, example_inputs)."
            )
        zeros = self._zeros(given)
        if self.returns is None:
            return zeros
        place, length = self.returns
        return tuple(zeros if i == place else None for i in range(length))

    def _zeros(self, given: Tensor) -> Tensor:
        raise NotImplementedError


class Like(_StandIn):
    """Zeros of its input's shape and dtype."""

    def _zeros(self, given: Tensor) -> Tensor:
        return torch.zeros_like(given)


class Zeros(_StandIn):
    """Zeros whose lengths are functions of its input's.

    Args:
        shape: one extent per dimension of the result.
        returns: see :class:`attrim.core.branches.Replacement`.

    Where a length is a width that a cut may change, it is that of the buffer ``zeros``, shape ``(width,)``, which is not part
    of the state dict and is cut like any other tensor.
    """

    zeros: Tensor

    def __init__(self, shape: tuple[Extent, ...], returns: tuple[int, int] | None = None) -> None:
        super().__init__(returns)
        self.shape = shape
        width = next((e.size for e in shape if e.channels), None)
        if width is not None:
            self.register_buffer("zeros", torch.zeros(width), persistent=False)

    def _zeros(self, given: Tensor) -> Tensor:
        sizes = [e.at(given.shape[e.source]) if e.source >= 0 else e.size for e in self.shape]
        dtype = given.dtype if given.is_floating_point() else None
        place = next((d for d, e in enumerate(self.shape) if e.channels), None)
        if place is None:
            return self._followed(given, sizes, dtype)
        row = self.zeros.to(dtype or self.zeros.dtype)
        sizes[place] = -1
        return row.view([-1 if d == place else 1 for d in range(len(sizes))]).expand(sizes).clone()

    def _followed(self, given: Tensor, sizes: list[int], dtype: torch.dtype | None) -> Tensor:
        """Zeros made from a corner of the input, so that a trace sees whose channels they are."""
        if given.ndim != len(sizes):
            return torch.zeros(sizes, dtype=dtype, device=given.device)
        whole = [e.source == d and not e.steps for d, e in enumerate(self.shape)]
        corner = given[tuple(slice(None) if keeps else slice(1) for keeps in whole)]
        return torch.zeros_like(corner, dtype=dtype or torch.get_default_dtype()).expand(sizes).clone()

    def extra_repr(self) -> str:
        """The shape, for people."""
        parts = [
            f"{len(self.zeros)}"
            if e.channels
            else f"{e.size}"
            if e.source < 0
            else f"input[{e.source}]{'/…' * bool(e.steps)}"
            for e in self.shape
        ]
        return ", ".join(parts)


def stand_in_for(replacement: Replacement) -> nn.Module:
    """The module that a replacement describes."""
    if replacement.kind == "identity":
        return nn.Identity()
    if replacement.kind == "like":
        return Like(replacement.returns)
    return Zeros(replacement.shape, replacement.returns)


def without_modules(
    model: nn.Module,
    drops: Collection[str],
    replacements: Mapping[str, Replacement],
    tensors: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of ``model`` in which the modules ``drops`` are replaced; the original is not touched.

    Args:
        drops: module paths; one that ``replacements`` does not name becomes an identity.
        tensors: new tensors by first name, as for :func:`attrim.modules.skeleton.copy_with`.

    Raises:
        PlanError: the model has no such module, or it is the model itself.
    """
    new: dict[str, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    device = next((t.device for t in model.parameters()), None)
    for path in drops:
        if not path or path not in modules:
            raise PlanError(
                f"the plan removes the module '{path}', which this model does not have. Build the model with the same "
                "arguments, or trace this model and make the plan again."
            )
        new[path] = stand_in_for(replacements.get(path, Replacement())).train(modules[path].training).to(device)
    return copy_with(model, named_tensors(model), tensors or {}, new)
