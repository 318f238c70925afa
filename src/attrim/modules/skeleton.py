"""Copies of a model in which tensors are replaced. The original is never touched, not even its train flag."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from attrim.errors import TraceError
from attrim.modules.names import NamedTensors

__all__ = ["copy_with"]


def copy_with(
    model: nn.Module,
    named: NamedTensors,
    replacement: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A deep copy of ``model`` whose tensors are those of ``replacement`` (by first name), ties included.

    ``modules`` (by path) take the places of the model's own. Tensors that ``replacement`` does not name are deep-copied. Hooks, plain attributes, subclasses and the train flag come
    along as ``copy.deepcopy`` copies them.

    Raises:
        TraceError: the model cannot be deep-copied (it holds a lock, a non-leaf tensor, …).
    """
    memo: dict[int, object] = {id(named.tensors[name]): tensor for name, tensor in replacement.items()}
    memo.update({id(model.get_submodule(path)): module for path, module in (modules or {}).items()})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"the model ({type(model).__name__}) cannot be deep-copied: {type(error).__name__}: {error}. attrim works on a "
            "copy and never on your model; remove locks, open files and non-leaf tensors from its attributes "
            "(detach cached activations), so that copy.deepcopy(model) runs."
        ) from error
