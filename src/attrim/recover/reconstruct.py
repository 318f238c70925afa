"""Least-squares reconstruction: consumers are fitted anew, without labels and without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from attrim.core.plan import PruningPlan
from attrim.errors import DataError, InputError
from attrim.modules.batches import Batch, batch_source, device_of, read_batch
from attrim.modules.progress import progress
from attrim.recover.refit.fit import RIDGES
from attrim.recover.refit.gather import Settings
from attrim.recover.refit.networks import check_networks, evaluating
from attrim.recover.refit.work import Refit, Work
from attrim.score.data import undisturbed

__all__ = ["Refit", "reconstruct"]


def reconstruct(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    sequence: bool = True,
    layers: Literal["all", "consumers"] = "all",
    samples: int | None = 1024,
    rectify: bool = True,
    ridges: tuple[float, ...] = RIDGES,
    memory: int = 8 << 30,
    widest: int = 4608,
    seed: int = 0,
    on_layer: Callable[[Refit], None] | None = None,
) -> nn.Module:
    """A copy of ``pruned`` whose layers are fitted to what the dense network computes. No labels, no gradients.

    Layers are taken in the order in which the network runs them. For each, the inputs come from the network as it is by
    then (pruned, and fitted up to there), the targets from the dense network: its output behind whatever batch norm
    follows; behind the sum with a shortcut, so that the shortcut's own error is made good as well; and where a ReLU comes
    next, values below zero only have to stay below zero. Each is a ridge regression towards the present weights, over
    samples of output positions; the damping is chosen on every fifth sample, which takes no part in the fit, and a layer
    is left as it was if no fit is better there. Where there is a bias or a batch norm, a constant is fitted too, and the
    batch norm gets the running statistics that are true for its new input, at the same function: recalibrating
    afterwards changes little. Convolutions (grouped and depthwise too) and matrix products are found where the operators
    run, not by their module type.

    Layers around a dropped branch take over from it (``docs/branches.md``). Call it right after the cut; both run in eval mode.

    Memory: the calibration inputs; up to ``memory`` bytes of activations of the pruned network while its forward passes
    wait for each other (more would be needed: every layer restarts the passes instead, which takes about half as many
    forward passes as there are layers); and for the targets and the rows of one layer a part of ``memory`` each.

    Args:
        dense: the original. Not changed.
        pruned: ``attrim.apply(dense, plan)``, recalibrated or not. Not changed.
        plan: what was cut.
        batches: inputs like those of training, with augmentation; labels are ignored. Under ``torch.distributed``
            every process gives its own share, and all get the same result.
        sequence: False fits each layer alone, to inputs from the dense network.
        layers: ``all``, or only the ``consumers`` of removed channels and the layers before dropped branches.
        samples: stop after the batch that reaches this many; None takes them all.
        rectify: False meets values below zero before a ReLU like all others.
        ridges: dampings to choose from, as fractions of the inputs' mean square, ascending.
        memory: bytes.
        widest: most unknowns of an output that are solved for at once; wider layers go in blocks.
        seed, on_layer: of the choice of output positions; called with a :class:`Refit` for every layer.

    Returns:
        A new module with the modes of ``pruned``.

    Raises:
        PlanError: the networks do not belong to the plan.
        DataError: no sample, or the model does not take the batches.
        InputError: an argument out of its range.

    Warns:
        AttrimWarning: consumers of removed channels that cannot be fitted, each with the reason.

    Source:
        He, Zhang, Sun, ICCV 2017, eq. 5; Zhang et al., TPAMI 2016; see :func:`attrim.recover.refit.fit.fit` for what
        is ours.

    Example:
        >>> small = attrim.apply(model, plan)
        >>> small = attrim.recover.reconstruct(model, small, plan, train_batches)
    """
    settings = Settings(tuple(ridges), rectify, widest, memory, seed)
    _check(settings, layers, samples)
    check_networks(dense, pruned, plan)
    with torch.inference_mode(False):  # tensors that can be written to
        small = copy.deepcopy(pruned)
    held = _hold(batches, device_of(dense), samples)
    with undisturbed(dense), evaluating(small), torch.no_grad():
        work = Work.prepare(dense, small, plan, held, settings, layers)
        for refit in progress(work.run(sequence), "reconstructing", len(work.pairs)):
            if on_layer is not None:
                on_layer(refit)
    return small


def _hold(batches: Iterable[Any], device: torch.device, samples: int | None) -> list[Batch]:
    held: list[Batch] = []
    seen = 0
    for raw in batch_source(batches):
        batch = read_batch(raw, device)
        if batch.size:
            held.append(batch)
            seen += batch.size
        if samples is not None and seen >= samples:
            break
    if not held:
        raise DataError("reconstruction read no sample: the source is empty, or a generator that was used up before.")
    return held


def _check(settings: Settings, layers: str, samples: int | None) -> None:
    limits = (
        ("layers", layers in ("all", "consumers"), "'all' or 'consumers'", layers),
        ("samples", samples is None or samples >= 1, "an int >= 1 or None", samples),
        ("memory", settings.memory >= 0, "bytes, an int >= 0", settings.memory),
        ("widest", settings.widest >= 1, "an int >= 1", settings.widest),
        ("ridges", bool(settings.ridges) and min(settings.ridges) >= 0, "numbers >= 0", settings.ridges),
    )
    for name, good, expected, found in limits:
        if not good:
            raise InputError(f"{name}: expected {expected}, found {found!r}.")
