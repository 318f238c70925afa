"""From tensors to channels: sums over a tensor axis, gathered with the members' index arrays.

Nothing here knows a layer type: a member says which axis of which tensor its channels live on and which positions
belong to each, and that is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from attrim.core.axes import Axis
from attrim.core.channels import ChannelGroup, ChannelMap, Member
from attrim.core.cost import IntArray
from attrim.errors import CriterionError
from attrim.modules.names import named_tensors
from attrim.score.combine import reduced
from attrim.score.kinds import Role

__all__ = [
    "AxisSums",
    "by_members",
    "check_finite",
    "check_roles",
    "move_first",
    "per_channel",
    "play",
    "tensors_of",
]

AxisSum = Callable[[Tensor, int], Tensor]
"""Called with a tensor and a dimension; returns one number per position, shape ``(tensor.shape[dim],)``."""


def tensors_of(model: nn.Module, channels: ChannelMap) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, detached, after checking that the map was traced from it.

    Raises:
        CriterionError: a tensor of the map is missing in the model or has another shape; the first one is named.
    """
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).tensors.items()}
    for name, shape in channels.shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            raise CriterionError(
                f"the channel map belongs to another model: it says '{name}' has shape {tuple(shape)}, the model has "
                f"{found or 'no such tensor'}. Trace this model: channels = attrim.trace(model, example_inputs)."
            )
    return tensors


def check_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """``roles`` as a tuple.

    Raises:
        CriterionError: not a non-empty sequence of known roles.
    """
    known = get_args(Role)
    if isinstance(roles, str) or not roles or any(role not in known for role in roles):
        raise CriterionError(f"roles: expected a tuple with some of {', '.join(known)}, found {roles!r}.")
    return tuple(roles)


def play(group: ChannelGroup, roles: Sequence[str], instead: Sequence[str] = ()) -> tuple[Member, ...]:
    """The members of ``group`` that play one of ``roles``, or one of ``instead`` when none does."""
    return group.with_role(*roles) or group.with_role(*instead)


def move_first(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` as a matrix with one row per position of ``dim``; shape ``(tensor.shape[dim], rest)``."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def per_channel(positions: Tensor, index: IntArray) -> Tensor:
    """Sum over the positions that each channel owns.

    Args:
        positions: shape ``(n,)``, one number per position of an axis.
        index: shape ``(size, k)``, of a member or a tap.

    Returns:
        shape ``(size,)``.
    """
    return positions[torch.from_numpy(index).to(positions.device)].sum(1)


def check_finite(values: Tensor, name: str) -> Tensor:
    """``values`` unchanged.

    Raises:
        CriterionError: there are NaN or infinite values, which come from the tensor ``name``.
    """
    if not bool(torch.isfinite(values).all()):
        raise CriterionError(
            f"'{name}' holds NaN or infinite values, so its channels cannot be compared. Repair the weights first; "
            "list them with: [n for n, p in model.named_parameters() if not p.isfinite().all()]."
        )
    return values


class AxisSums:
    """Sums over tensor axes, each computed once: in a concat-rich net many groups share one axis."""

    def __init__(self, tensors: dict[str, Tensor], total: AxisSum) -> None:
        self._tensors = tensors
        self._total = total
        self._known: dict[Axis, Tensor] = {}

    def __call__(self, member: Member) -> Tensor:
        """The sum for each channel of ``member``; shape ``(size,)``, float64 on the CPU."""
        axis = member.axis
        if axis not in self._known:
            total = self._total(self._tensors[axis.tensor], axis.dim).to("cpu", torch.float64)
            self._known[axis] = check_finite(total, axis.tensor)
        return per_channel(self._known[axis], member.index)


def by_members(
    channels: ChannelMap,
    value: Callable[[Member], Tensor],
    reduction: str,
    roles: Sequence[str],
    instead: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Value each member that plays one of ``roles`` (or of ``instead``, where none does) and reduce over members.

    Groups without any such member are absent from the result.
    """
    roles = check_roles(roles)
    result: dict[str, Tensor] = {}
    for group in channels:
        members = play(group, roles, instead)
        if members:
            result[group.id] = reduced(torch.stack([value(member) for member in members]), reduction)
    return result
