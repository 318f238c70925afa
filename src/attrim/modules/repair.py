"""Module attributes that state a width: a table from module type to the function that makes them true again.

The table is passed around, not registered in a global: ``{**REPAIRS, MyConv: repair_my_conv}`` adds a type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from attrim.errors import SurgeryError

__all__ = ["REPAIRS", "Keep", "Repair", "read_attribute", "repair_attributes", "write_attribute"]

Keep = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Local tensor name (``weight``) -> dimension -> kept indices, for the tensors of one module that were cut."""

Repair = Callable[[Any, Keep], None]
"""Called with the copied module (tensors already cut) and what was kept of its own tensors."""

_INDEXED = re.compile(r"(\w+)\[(-?\d+)\]")


def repair_attributes(
    model: nn.Module, keep: Keep, aliases: Mapping[str, str], table: Mapping[type[nn.Module], Repair] | None = None
) -> None:
    """Repair every module of ``model`` that owns a cut tensor, in place (the model is attrim's own copy).

    Args:
        model: the copy that already holds the cut tensors.
        keep: first tensor name -> dimension -> kept indices.
        aliases: other name of a tied tensor -> first name.
        table: module type -> repair; the most specific type wins. Defaults to :data:`REPAIRS`.
    """
    table = REPAIRS if table is None else table
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        names = [n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
        local = {n: keep[full] for n in names if (full := aliases.get(prefix + n, prefix + n)) in keep}
        if local:
            for kind in type(module).__mro__:
                if kind in table:
                    table[kind](module, local)
                    break


def read_attribute(module: nn.Module, attribute: str) -> Any:
    """The value of ``attribute``; ``name[i]`` reads an element of a tuple or list."""
    match = _INDEXED.fullmatch(attribute)
    return getattr(module, match[1])[int(match[2])] if match else getattr(module, attribute)


def write_attribute(module: nn.Module, attribute: str, value: int) -> None:
    """Set ``attribute`` to ``value``; ``name[i]`` replaces an element of a tuple or list."""
    match = _INDEXED.fullmatch(attribute)
    if not match:
        setattr(module, attribute, value)
        return
    old = getattr(module, match[1])
    new = list(old)
    new[int(match[2])] = value
    setattr(module, match[1], type(old)(new) if isinstance(old, list) else tuple(new))


def surviving_blocks(kept: np.ndarray[Any, np.dtype[Any]], size: int, blocks: int, what: str) -> int:
    """How many equal blocks of an axis survive, given the kept positions; all survivors must have the same width.

    Raises:
        SurgeryError: the surviving blocks have different widths.
    """
    counts = np.bincount(kept // (size // blocks), minlength=blocks)
    alive = counts[counts > 0]
    if len(set(alive.tolist())) > 1:
        raise SurgeryError(
            f"a grouped {what} with {blocks} groups would keep {counts.tolist()} channels in its groups; every surviving "
            "group must keep the same number. Make the plan with attrim.allocate, which removes them evenly."
        )
    return len(alive)


def _conv(module: _ConvNd, keep: Keep) -> None:
    transposed = isinstance(module, _ConvTransposeNd)
    weight = keep.get("weight")
    if weight is None:  # the weight is computed; what states the width is the bias, or nothing
        if "bias" in keep:
            module.out_channels = len(keep["bias"][0])
        return
    groups = module.groups
    if groups > 1 and 0 in weight:
        before = module.in_channels if transposed else module.out_channels
        groups = surviving_blocks(np.asarray(weight[0]), before, groups, "convolution")
    rows, columns = module.weight.shape[:2]
    module.groups = groups
    module.in_channels = rows if transposed else columns * groups
    module.out_channels = columns * groups if transposed else rows


def _linear(module: nn.Linear, keep: Keep) -> None:
    module.out_features, module.in_features = module.weight.shape


def _norm(module: _NormBase, keep: Keep) -> None:
    module.num_features = len(_first(keep)[0])


def _layer_norm(module: Any, keep: Keep) -> None:
    tensor = getattr(module, next(iter(keep)))
    module.normalized_shape = tuple(tensor.shape)


def _group_norm(module: nn.GroupNorm, keep: Keep) -> None:
    kept = np.asarray(_first(keep)[0])
    module.num_groups = surviving_blocks(kept, module.num_channels, module.num_groups, "norm")
    module.num_channels = len(kept)


def _embedding(module: Any, keep: Keep) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: nn.PReLU, keep: Keep) -> None:
    module.num_parameters = module.weight.shape[0]


def _bilinear(module: nn.Bilinear, keep: Keep) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _recurrent(module: nn.RNNBase, keep: Keep) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    weight: Tensor = module.weight_ih_l0  # type: ignore[assignment]
    module.input_size = weight.shape[1]
    module.hidden_size = weight.shape[0] // gates


def _recurrent_cell(module: nn.RNNCellBase, keep: Keep) -> None:
    module.hidden_size = module.weight_hh.shape[1]
    module.input_size = module.weight_ih.shape[1]


def _first(keep: Keep) -> Mapping[int, tuple[int, ...]]:
    return next(iter(keep.values()))


REPAIRS: Mapping[type[nn.Module], Repair] = {
    _ConvNd: _conv,
    nn.Linear: _linear,
    _NormBase: _norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.PReLU: _prelu,
    nn.Bilinear: _bilinear,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent_cell,
}
"""Repairs for torch's own modules."""
