"""Recovery without training, in the order that measures best."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attrim.core.plan import PruningPlan
from attrim.errors import AttrimWarning, DataError
from attrim.modules.batches import batch_source, device_of, read_batch, run_batch
from attrim.modules.progress import progress
from attrim.recover.evaluate import restore_modes
from attrim.recover.recalibrate import recalibrate
from attrim.recover.reconstruct import Refit, reconstruct

__all__ = ["free_recovery", "output_gap"]

_JUDGED = 16
"""Batches on which the outcome is compared with the dense network."""


def free_recovery(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    on_step: Callable[[str, nn.Module, Mapping[str, Any]], None] | None = None,
    **options: Any,
) -> nn.Module:
    """Win back what can be won without training: least-squares reconstruction, then batch norm measured anew if that helps.

    Reconstruction leaves batch norms with the statistics that their new inputs have, so recalibration afterwards is
    mostly idle; where it brings the outputs closer to the dense network's (batch norms that no fitted layer feeds), its
    result is taken. A network in which nothing can be fitted is recalibrated. Recalibrating *before* the fit is of no
    use: the fit's targets are the dense network's outputs at the dense network's statistics.

    Args:
        dense: the original. Not changed.
        pruned: the cut network. Not changed.
        plan: what was cut.
        batches: inputs as for training, augmented; gone through several times. Labels are ignored.
        on_step: called after each step with its name, the network and figures: ``gap`` (see :func:`output_gap`), and
            whether it was ``taken``.
        options: of :func:`attrim.recover.reconstruct`.

    Returns:
        A new module.

    Example:
        >>> small = attrim.recover.free_recovery(model, small, plan, train_batches)
    """
    layers: list[Refit] = []
    best = reconstruct(dense, pruned, plan, batches, on_layer=layers.append, **options)
    gap = output_gap(dense, best, batches)
    fitted = sum(layer.ridge > 0 for layer in layers)
    if on_step is not None:
        on_step("reconstruct", best, {"layers": fitted, "gap": gap, "taken": True})
    if any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in best.modules()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttrimWarning)
            measured = recalibrate(best, batches)
        new = output_gap(dense, measured, batches)
        if on_step is not None:
            on_step("recalibrate", measured, {"gap": new, "taken": new < gap})
        best = measured if new < gap else best
    return best


@torch.no_grad()
def output_gap(dense: nn.Module, pruned: nn.Module, batches: Iterable[Any], *, limit: int | None = _JUDGED) -> float:
    """Squared difference of two networks' outputs, relative to the size of the first one's; 0 when they are equal.

    Args:
        dense, pruned: networks with outputs of the same shapes; both run in eval mode and get their modes back.
        batches: inputs.
        limit: the most batches to read.

    Raises:
        DataError: no batch, or outputs of other shapes.
    """
    modes = [(module, module.training) for model in (dense, pruned) for module in model.modules()]
    dense.eval(), pruned.eval()
    device = device_of(dense)
    difference = torch.zeros((), dtype=torch.float64, device=device)
    size = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for raw in progress(islice(batch_source(batches), limit), "comparing with the dense network", limit):
            batch = read_batch(raw, device)
            ours, theirs = (_tensors(run_batch(model, batch)) for model in (pruned, dense))
            if [a.shape for a in ours] != [b.shape for b in theirs]:
                raise DataError(
                    "the two networks have outputs of different shapes; expected a network and its pruned copy."
                )
            for a, b in zip(ours, theirs, strict=True):
                difference += (a - b).double().square().sum()
                size += b.double().square().sum()
    finally:
        restore_modes(modes)
    if not float(size):
        raise DataError("the networks could not be compared: no batch, or outputs that are all zero.")
    return float(difference / size)


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, list | tuple):
        return [tensor for part in outputs for tensor in _tensors(part)]
    return []
