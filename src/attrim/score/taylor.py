"""taylor: how much the loss changes, to first order, when a channel goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrim.core.axes import Axis
from attrim.core.channels import ChannelMap, Member
from attrim.errors import CriterionError
from attrim.modules.batches import Batch, logits_of
from attrim.modules.names import named_tensors
from attrim.score.combine import reduced
from attrim.score.data import forward, stream, undisturbed
from attrim.score.gather import check_roles, per_channel, play

__all__ = ["Joint", "Loss", "taylor"]

Loss = Callable[[Any, Any], Tensor]
"""Called with the model's outputs and the batch as the source gave it; returns the mean loss of the batch, a scalar."""

Joint = Literal["group", "member", "element"]


def taylor(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    *,
    reduction: str = "mean",
    roles: Sequence[str] = ("in",),
    joint: Joint = "member",
    power: int = 2,
    per: Literal["batch", "data"] = "batch",
    loss: Loss | None = None,
    samples: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """``|Σ w · ∂L/∂w|^power`` over the weights that read a channel: the first-order change of the loss without it.

    Setting a channel's columns to zero in its consumers is what removing it does, so the sum over an ``in`` member is
    the first-order change of the loss by definition, and equals the derivative with respect to a gate in front of that
    consumer. The values of several consumers are averaged; ``joint="group"`` adds them with their signs instead, the
    derivative of one gate on the channel.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019: the first-order criterion
    of a gate, (∂L/∂z)² = (Σ w ∂L/∂w)², averaged over mini-batches. Reading the consumers in place of
    the filter or a batch-norm gate is our reading; ``roles=("scale", "shift"), joint="group"`` is
    the paper's gate, ``roles=("out",)`` its filter.

    Args:
        roles: whose weights count. Where no member plays them, the producers stand in: ``("out", "shift", "param")``.
        joint: what is summed with its sign before the absolute value: each ``member`` (then ``reduction`` over
            members), the whole ``group``, or each ``element`` alone (Σ |w ∂L/∂w|).
        power: 1 or 2.
        per: ``batch`` averages the value of each batch, weighted by its size (batches of one sample give the diagonal
            of the Fisher information of the gates); ``data`` takes the value of the gradient averaged over all data,
            which is small in a trained network but does not depend on how the data are cut into batches.
        loss: ``(outputs, batch) -> scalar``, a mean over the batch. Default: cross-entropy with the batch's labels.
        samples: stop after the batch that reaches this many samples.
        progress: show progress when it takes longer than two seconds.

    Raises:
        CriterionError: no labels for the default loss, a loss that is not one finite number, or a wrong option.
    """
    _check(joint, power, per, reduction)
    roles = check_roles(roles)
    members = {group.id: play(group, roles, ("out", "shift", "param")) for group in channels}
    tensors = named_tensors(model)
    wanted = {
        name: tensors.tensors[name]
        for name in dict.fromkeys(m.axis.tensor for group in members.values() for m in group)
        if name in tensors.parameters and tensors.tensors[name].is_floating_point()
    }
    sums = _Sums(members, joint, power, per)
    with undisturbed(model), _gradients_of(model, wanted):
        for batch in stream(model, batches, "taylor", samples=samples, show=progress):
            grads = _gradients(model, batch, wanted, loss or _cross_entropy)
            sums.add(wanted, grads, batch.size)
    return sums.result(reduction)


class _Sums:
    """Running float64 sums: one row of ``size`` numbers per group, or per member."""

    def __init__(self, members: Mapping[str, tuple[Member, ...]], joint: Joint, power: int, per: str) -> None:
        self._members = {name: group for name, group in members.items() if group}
        self._axes = list(dict.fromkeys(m.axis for group in self._members.values() for m in group))
        self._joint, self._power, self._per = joint, power, per
        self._total: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], size: int) -> None:
        """Take one batch in."""
        products = {name: _product(weights[name], grad, self._joint) for name, grad in grads.items()}
        positions = {axis: _over(products[axis.tensor], axis.dim) for axis in self._axes if axis.tensor in products}
        for name, members in self._members.items():
            if any(m.axis in positions for m in members):
                value = size * self._value(positions, members)
                self._total[name] = self._total[name] + value if name in self._total else value
        self._samples += size

    def _value(self, positions: Mapping[Axis, Tensor], members: tuple[Member, ...]) -> Tensor:
        rows = torch.stack(
            [
                per_channel(positions[m.axis], m.index)
                if m.axis in positions
                else torch.zeros(len(m.index), dtype=torch.float64)
                for m in members
            ]
        )
        if self._joint == "group":
            rows = rows.sum(0, keepdim=True)
        return rows if self._per == "data" else rows.abs() ** self._power

    def result(self, reduction: str) -> dict[str, Tensor]:
        """The mean over samples, reduced over members; groups that no gradient reached are absent."""
        means = {name: total / self._samples for name, total in self._total.items()}
        if self._per == "data":
            means = {name: mean.abs() ** self._power for name, mean in means.items()}
        return {name: reduced(mean, reduction) for name, mean in means.items()}


def _product(weight: Tensor, grad: Tensor, joint: Joint) -> Tensor:
    product = weight.detach().float() * grad.float() if weight.element_size() < 4 else weight.detach() * grad
    return product.abs() if joint == "element" else product


def _over(product: Tensor, dim: int) -> Tensor:
    """Sum over all dimensions but ``dim``; float64 on the CPU."""
    others = [d for d in range(product.ndim) if d != dim]
    return (product.sum(others) if others else product).to("cpu", torch.float64)


def _gradients(model: nn.Module, batch: Batch, wanted: Mapping[str, Tensor], loss: Loss) -> dict[str, Tensor]:
    with torch.enable_grad():
        outputs = forward(model, batch)
        value = loss(outputs, batch) if loss is _cross_entropy else loss(outputs, batch.raw)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise CriterionError(f"loss: expected one number per batch (a scalar tensor), found {found}.")
    if not bool(torch.isfinite(value)):
        raise CriterionError(
            f"the loss of a batch is {value.item()}: look for NaN in the data, or for a loss that overflows."
        )
    if not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value.reshape(()), list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def _cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    if not isinstance(batch.labels, Tensor):
        raise CriterionError(
            "criterion 'taylor' needs labels and a batch has none. Give (inputs, labels) batches, dicts with 'labels', "
            "or your own loss: loss=lambda outputs, batch: ..."
        )
    return nn.functional.cross_entropy(logits_of(outputs), batch.labels)


@contextmanager
def _gradients_of(model: nn.Module, wanted: Mapping[str, Tensor]) -> Iterator[None]:
    """Only the wanted parameters require a gradient inside; the flags are as before afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted.values()}
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _check(joint: str, power: int, per: str, reduction: str) -> None:
    if joint not in ("group", "member", "element"):
        raise CriterionError(f"joint: expected group, member or element, found {joint!r}.")
    if power not in (1, 2):
        raise CriterionError(f"power: expected 1 or 2, found {power!r}.")
    if per not in ("batch", "data"):
        raise CriterionError(f"per: expected batch or data, found {per!r}.")
    if joint == "element" and per == "data":
        raise CriterionError(
            "joint='element' keeps one number per weight when per='data'. Use per='batch', or joint='member'."
        )
    reduced(torch.ones(1, 1), reduction)
