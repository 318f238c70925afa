"""Layers that read only a part of their input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attrim.core.plan import Cut, PruningPlan
from attrim.core.selection import Selection
from attrim.errors import PlanError

__all__ = [
    "SELECTING",
    "SelectConv1d",
    "SelectConv2d",
    "SelectConv3d",
    "SelectLinear",
    "can_select",
    "check_selects",
    "input_dim",
    "positions_of",
    "select_inputs",
]


class _Select(nn.Module):
    """Reads the positions ``positions`` of its input: an integer buffer, shape ``(k,)``, not part of the state dict."""

    positions: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output for the selected channels of ``input``."""
        read = input.index_select(input_dim(self), self.positions)
        result: Tensor = super().forward(read)
        return result

    def extra_repr(self) -> str:
        """The layer's own description, and where it reads."""
        return f"{super().extra_repr()}, positions=({len(self.positions)} up to {int(self.positions[-1])})"


class SelectConv1d(_Select, nn.Conv1d):
    """A one-dimensional convolution of some channels of its input."""


class SelectConv2d(_Select, nn.Conv2d):
    """A two-dimensional convolution of some channels of its input."""


class SelectConv3d(_Select, nn.Conv3d):
    """A three-dimensional convolution of some channels of its input."""


class SelectLinear(_Select, nn.Linear):
    """A linear layer of some features of its input."""


SELECTING: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: SelectConv1d,
    nn.Conv2d: SelectConv2d,
    nn.Conv3d: SelectConv3d,
    nn.Linear: SelectLinear,
}
"""Type of a layer -> the same layer with a selection in front."""


_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that may hand the weights of their parts to one kernel, past the parts."""


def can_select(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a layer may read a part of its input: torch's own convolutions without groups, and linear layers.

    Args:
        modules: of the network, by path.
        path: of the layer.
    """
    module = modules.get(path)
    known = type(module) in SELECTING or type(module) in SELECTING.values()
    called = not isinstance(modules.get(path.rpartition(".")[0]), _FUSED)
    return known and called and getattr(module, "groups", 1) == 1


def input_dim(module: nn.Module) -> int:
    """Dimension of a layer's input that holds its channels, counted from the end."""
    return -1 - len(module.kernel_size) if hasattr(module, "kernel_size") else -1  # type: ignore[arg-type]


def positions_of(module: nn.Module) -> Tensor | None:
    """What a layer reads of its input, shape ``(k,)``; None if it reads all."""
    return module.positions if isinstance(module, _Select) else None


def check_selects(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse selections that this model's layers cannot make.

    Raises:
        PlanError: an unknown module, a layer of an unsupported type, or positions that do not fit the cut of its weight.
    """
    modules = dict(model.named_modules())
    for path, selection in plan.selects.items():
        module = modules.get(path)
        if module is None:
            raise PlanError(
                f"the plan selects inputs of '{path}', which this model does not have. Build the model with the same "
                "arguments, or trace this model and make the plan again."
            )
        if not can_select(modules, path):
            groups = f" with {module.groups} groups" if getattr(module, "groups", 1) != 1 else ""
            raise PlanError(
                f"the plan selects inputs of '{path}' ({type(module).__name__}{groups}); expected a Conv1d, Conv2d or Conv3d "
                "without groups, or a Linear, of torch's own types and not inside a fused module."
            )
        _check_selection(path, module, selection, plan.cuts.get(f"{path}.weight"))


def _check_selection(path: str, module: nn.Module, selection: Selection, cut: Cut | None) -> None:
    if selection.dim != input_dim(module):
        raise PlanError(
            f"the plan selects from dimension {selection.dim} of the input of '{path}' ({type(module).__name__}), whose "
            f"channels lie on dimension {input_dim(module)}."
        )
    kept = () if cut is None else cut.keep.get(1, ())
    if len(kept) != len(selection.keep) or any(k < p for k, p in zip(kept, selection.keep, strict=True)):
        found = f"dimension 1 of its weight keeps {len(kept)} positions" if kept else "its weight is not cut there"
        raise PlanError(
            f"the plan is malformed: '{path}' reads {len(selection.keep)} positions of its input, but {found}, or other ones. "
            "Make the plan with attrim.plan_from_kept(input_groups(model, channels), kept)."
        )


def select_inputs(model: nn.Module, selects: Mapping[str, Selection]) -> None:
    """Put selections in front of layers of ``model``, in place (the model is attrim's own copy, its weights are cut).

    The layers keep their names, parameters and hooks; their type becomes that of :data:`SELECTING`. A layer that selects
    already selects from its selection.
    """
    for path, selection in selects.items():
        module = model.get_submodule(path)
        weight: Tensor = module.weight  # type: ignore[assignment]
        keep = torch.tensor(selection.keep, device=weight.device)
        earlier = positions_of(module)
        if earlier is None:
            module.__class__ = SELECTING[type(module)]
        else:
            keep = earlier.index_select(0, keep.to(earlier.device))
        module.register_buffer("positions", keep, persistent=False)
