"""What a ratio search maximises: the accuracy of the network with these widths, without any training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.core.scores import Scores
from attrim.errors import AttrimWarning, DataError, InputError
from attrim.modules.batches import device_of, read_batch, run_batch
from attrim.recover.evaluate import evaluate, restore_modes
from attrim.recover.recalibrate import recalibrate
from attrim.recover.reconstruct import reconstruct
from attrim.search.decide import plan_from_kept
from attrim.search.space import Point
from attrim.surgery.cut import apply

__all__ = ["Metric", "NaiveObjective", "Objective", "best_channels"]

Metric = Callable[[Any, Any], Any]
"""``(outputs, batch) -> float``, mean over the batch, larger is better; ``batch`` as the data source gave it."""


class Objective(Protocol):
    """Anything that is called with the kept count of every group. NaN counts as hopeless.

    :class:`attrim.methods.fast.objective.FastObjective` has three methods more, which are used where they are there:
    ``judge_one(kept)`` instead of a call, ``expect`` before each batch and ``learn`` after it.
    """

    def __call__(self, kept: Mapping[str, int]) -> float:
        """Value of a candidate; larger is better."""


class NaiveObjective:
    """Cut a copy, measure its batch norms anew, evaluate it on everything. Slow and plain; what faster ones are held to.

    Args:
        model: the trained network. Never changed.
        channels: its map.
        scores: which channels of a group stay: those with the largest scores.
        calibration: batches of training images for the batch norms (and for ``reconstruct``), augmented as in training.
        holdout: batches of labelled training images that nothing is trained on. Never test images.
        metric: ``(outputs, batch) -> float`` instead of top-1 accuracy; ``lambda outputs, batch: -loss(outputs, batch[1])``.
        refit: refit the layers by least squares before the batch norms are measured
            (:func:`attrim.recover.reconstruct`), which costs much more.

    Raises:
        DataError: no batches in ``holdout``, or none in ``calibration`` where they are needed.

    Example:
        >>> objective = NaiveObjective(model, channels, scores, calibration, holdout)
        >>> objective({"layer1.0.conv1": 9})          # groups that are not named stay whole
        0.8812

    Source: recalibrated accuracy as a proxy of accuracy after training: Li et al., EagleEye, ECCV 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: ChannelMap,
        scores: Scores,
        calibration: Sequence[Any],
        holdout: Sequence[Any],
        *,
        metric: Metric | None = None,
        refit: bool = False,
    ) -> None:
        self._model, self._channels, self._scores = model, channels, scores
        self._calibration, self._holdout = calibration, holdout
        self._metric, self._refit = metric, refit
        self._normed = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in model.modules())
        if not holdout:
            raise DataError("holdout: no batch. A search judges its candidates on labelled held-out training images.")
        if not calibration and (self._normed or refit):
            raise DataError("data: no batch. Batch norms are measured anew for every candidate, on training images.")

    def __call__(self, kept: Mapping[str, int] | Point) -> float:
        """The value of one candidate: kept counts by group, or of all groups in the cost model's order."""
        network = self.network(kept)
        return evaluate(network, self._holdout) if self._metric is None else self._mean(network, self._metric)

    def network(self, kept: Mapping[str, int] | Point) -> nn.Module:
        """The cut network as it is judged."""
        plan = plan_from_kept(self._channels, best_channels(self._channels, self._scores, kept))
        small = apply(self._model, plan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttrimWarning)
            if self._refit:
                small = reconstruct(self._model, small, plan, self._calibration)
        return recalibrate(small, self._calibration, limit=None) if self._normed else small

    @torch.no_grad()
    def _mean(self, network: nn.Module, metric: Metric) -> float:
        total, samples, device = 0.0, 0, device_of(network)
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        try:
            for raw in self._holdout:
                batch = read_batch(raw, device)
                total += float(metric(run_batch(network, batch), batch.raw)) * batch.size
                samples += batch.size
        finally:
            restore_modes(modes)
        return total / max(1, samples)


def best_channels(channels: ChannelMap, scores: Scores, kept: Mapping[str, int] | Point) -> dict[str, IntArray]:
    """The channels of each group that stay when so many do: those with the largest scores, of equals the first ones.

    Raises:
        InputError: a group without scores would have to shrink, or counts that it cannot keep.
    """
    vector = channels.cost.vector(kept)
    chosen = {}
    for group, count, size in zip(channels.cost.groups, vector.tolist(), channels.cost.sizes.tolist(), strict=True):
        if count == size:
            continue
        if group not in scores.values:
            raise InputError(f"group '{group}' has no scores, so it stays whole; found {count} of {size} channels.")
        values = scores.values[group].numpy()
        chosen[group] = np.sort(np.lexsort((np.arange(size), -values))[:count])
    return chosen
