"""Static attention written into the weights, where that changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from attrim.core.channels import Member
from attrim.errors import InputError
from attrim.modules.gates.places import Place
from attrim.modules.names import named_tensors

__all__ = ["fold"]

_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

Targets = list[tuple[str, Member]]


def fold(
    places: Mapping[str, Sequence[Place]],
    members: Mapping[str, Sequence[Member]],
    model: nn.Module,
    attention: Mapping[str, Tensor],
    *,
    skip: bool,
) -> nn.Module:
    """See :meth:`attrim.modules.gates.Gates.fold`."""
    folded = copy.deepcopy(model)
    named = named_tensors(folded)
    modules = dict(folded.named_modules())
    shared = set(named.aliases.values())
    work: list[tuple[Tensor, Targets]] = []
    reasons: dict[str, str] = {}
    for group, factors in attention.items():
        if group not in places:
            raise InputError(
                f"attention: '{group}' has no gates. The gated groups are: {', '.join(list(places)[:8])}, …"
            )
        _check(group, factors, len(places[group][0].index))
        targets: list[tuple[str, Member]] = []
        for place in places[group]:
            found, reason = _targets(place, members[group], modules, named.tensors, shared)
            if reason:
                reasons[group] = reason
            targets += found
        if group not in reasons:
            work.append((factors, targets))
    if reasons and not skip:
        listed = "; ".join(f"'{group}': {reason}" for group, reason in list(reasons.items())[:3])
        raise InputError(
            f"{len(reasons)} of {len(attention)} groups cannot be folded exactly: {listed}. Drop their gates, or pass "
            "skip=True to fold the others."
        )
    with torch.no_grad():
        for factors, targets in work:
            for name, member in targets:
                _scale(named.tensors[name], member, factors)
    return folded


def _check(group: str, factors: Tensor, size: int) -> None:
    if factors.shape != (size,) or not bool(factors.isfinite().all()) or bool((factors < 0).any()):
        raise InputError(
            f"attention: expected {size} finite factors >= 0 for group '{group}', found shape {tuple(factors.shape)} with "
            f"values from {float(factors.min()):.3g} to {float(factors.max()):.3g}."
        )


def _targets(
    place: Place,
    members: Sequence[Member],
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    shared: set[str],
) -> tuple[Targets, str]:
    """The tensors that take a place's factors, or why there are none."""
    if place.before:
        return _consumers(place, members, tensors, shared, f"'{place.source}' reads its input")
    held = [modules[path] for path in (place.source, *place.chain)]
    anchor = len(held) - 1
    while anchor > 0 and type(held[anchor]) in _HOMOGENEOUS:
        anchor -= 1
    path = (place.source, *place.chain)[anchor]
    own = _own(path, held[anchor], members, tensors, shared)
    return (own, "") if isinstance(own, list) else _consumers(place, members, tensors, shared, own)


def _own(
    path: str, module: nn.Module, members: Sequence[Member], tensors: Mapping[str, Tensor], shared: set[str]
) -> list[tuple[str, Member]] | str:
    """Weight and bias of the module that gives the gated tensor, or why they cannot take a factor."""
    known = isinstance(module, (*_NORMS, _ConvNd, nn.Linear)) and type(module).__module__.startswith("torch.nn.modules")
    if not known:
        return f"'{path}' ({type(module).__name__}) is not linear in its own parameters"
    found = []
    for leaf in ("weight", "bias"):
        name = f"{path}.{leaf}"
        if getattr(module, leaf, None) is None:
            if leaf == "weight":
                return f"'{path}' has no weight"
            continue
        mine = [m for m in members if m.axis.tensor == name and m.role in ("out", "scale", "shift", "param")]
        if name not in tensors or not mine or name in shared:
            return f"'{name}' is computed, or is used elsewhere too"
        found += [(name, m) for m in mine]
    return found


def _consumers(
    place: Place, members: Sequence[Member], tensors: Mapping[str, Tensor], shared: set[str], blocked: str
) -> tuple[Targets, str]:
    """Input slices of the weights that read the channels."""
    reading = place.reading
    if reading is None:
        return [], f"{blocked}, and who reads its output is not known; make the gates with Gates(..., example=batch)"
    if reading.blocked or not reading.weights:
        what = f"its output goes through '{reading.blocked}'" if reading.blocked else "no weight reads its output"
        return [], f"{blocked}, and {what}"
    found = []
    for name in sorted(reading.weights):
        mine = [m for m in members if m.axis.tensor == name]
        mine = [m for m in mine if m.role == "in"] or mine
        if not mine or name not in tensors or name in shared:
            return [], f"{blocked}, and the weight '{name}' that reads it cannot take the factors"
        found += [(name, m) for m in mine]
    return found, ""


def _scale(tensor: Tensor, member: Member, factors: Tensor) -> None:
    index = torch.as_tensor(member.index, device=tensor.device)
    along = torch.ones(tensor.shape[member.axis.dim], dtype=tensor.dtype, device=tensor.device)
    along[index] = factors.to(tensor.device, tensor.dtype)[:, None].expand(-1, index.shape[1])
    shape = [1] * tensor.ndim
    shape[member.axis.dim] = -1
    tensor.mul_(along.view(shape))
