"""What a sample ranks the channels by, and orders turned into scores and plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.methods.ratio import check_size, plan_by_ratio
from attrim.modules.gates import Collected
from attrim.search.allocate import allocate
from attrim.search.decide import plan_from_kept
from attrim.search.limits import candidates

__all__ = ["Alloc", "Ranked", "Reader", "attention_scores", "non_increasing", "place_scores", "plan_of_orders"]

Alloc = Literal["uniform", "attention"]
Ranked = Literal["logits", "attention"]


@dataclass(frozen=True, slots=True)
class Reader:
    """Takes the scores that are ranked from what gates give.

    Attributes:
        ranked: the gates' logits, or their attention.
    """

    ranked: Ranked = "logits"

    def read(self, collected: Collected) -> dict[str, tuple[Tensor, Tensor]]:
        """Group -> scores and attention, each ``(B, C)``; the places of a group under each other, each with its own row."""
        found = {}
        for group, values in collected.attention.items():
            attention = torch.cat(values) if len(values) > 1 else values[0]
            if self.ranked == "attention":
                found[group] = attention, attention
            else:
                logits = collected.logits[group]
                found[group] = (torch.cat(logits) if len(logits) > 1 else logits[0]), attention
        return found


def place_scores(orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group -> ``(C,)``: ``1 - place / C``, the place counted from 0; every group's first channel has 1."""
    return {group: _scatter(order, 1 - torch.arange(len(order)) / len(order)) for group, order in orders.items()}


def attention_scores(orders: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group -> ``(C,)``: mean attention relative to the group's, made to fall along the group's order.

    Sorted by these scores the channels of a group are in its order exactly, so a threshold over all groups takes from each
    what comes first in it.

    Args:
        orders: group -> ``(C,)``, the most important first.
        mean: group -> ``(C,)``, mean attention, not negative.
    """
    scores = {}
    for group, order in orders.items():
        fitted = non_increasing(mean[group].double().numpy()[order.numpy()])
        level = fitted / fitted.mean() if fitted.mean() > 0 else np.ones_like(fitted)
        scores[group] = _scatter(order, torch.from_numpy(_falling(level.astype(np.float32))))
    return scores


def non_increasing(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sequence that never rises and is closest to ``values`` in least squares (isotonic regression).

    Source:
        The min-max formula of Barlow et al., "Statistical inference under order restrictions", 1972:
        ``m_k = min_{a <= k} max_{b >= k} mean(values[a..b])``. Memory ``C²``.
    """
    size = len(values)
    sums = np.concatenate([[0.0], values.cumsum()])
    first, last = np.arange(size)[:, None], np.arange(size)[None, :]
    means = np.where(last >= first, (sums[None, 1:] - sums[:-1, None]) / np.maximum(last - first + 1, 1), -np.inf)
    best = np.maximum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
    fitted: npt.NDArray[np.float64] = np.minimum.accumulate(best, axis=0)[np.arange(size), np.arange(size)]
    return np.minimum.accumulate(fitted)  # sums round


def plan_of_orders(
    channels: ChannelMap, scores: Scores, alloc: Alloc, budget: Budget | None, ratio: float | None
) -> PruningPlan:
    """How many channels each group keeps; which is said by the order.

    Args:
        channels: the traced network.
        scores: that fall along each group's order.
        alloc: ``uniform`` keeps the same fraction everywhere: with ``ratio`` p ``C - floor(p C)`` of C channels.
            ``attention`` sets one threshold over all groups.
        budget: what may be kept; beside a ratio only its floors count, a tenth of a group without a budget.
        ratio: fraction of the channels that goes.

    Raises:
        BudgetError, InputError: as :func:`attrim.allocate`; or no size is given, or two.
    """
    check_size(budget, ratio)
    rules = budget or Budget(channels=1.0)
    if alloc == "attention":
        return allocate(channels, scores, rules) if ratio is None else plan_by_ratio(channels, scores, ratio, rules)
    if ratio is None:
        return allocate(channels, scores, replace(rules, scope="group"))
    kept = {}
    for group in candidates(channels, scores, rules):
        size = channels[group].size
        stays = max(rules.floor(size), size - int(ratio * size + 1e-9))
        stays = min(size, -(-stays // rules.multiple_of) * rules.multiple_of)
        kept[group] = scores.values[group].argsort(descending=True, stable=True)[:stays].numpy()
    return plan_from_kept(channels, kept, {"criterion": scores.criterion, "ratio": ratio})


def _scatter(order: Tensor, values: Tensor) -> Tensor:
    return torch.empty(len(order), dtype=torch.float32).index_copy_(0, order, values.float())


def _falling(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The closest floats below that fall strictly; ``values`` are not negative and never rise."""
    steps = np.arange(len(values))
    ordinal = values.view(np.int32).astype(np.int64) + len(values)  # neighbouring floats have neighbouring bits
    strict: npt.NDArray[np.float32] = (np.minimum.accumulate(ordinal + steps) - steps).astype(np.int32).view(np.float32)
    return strict
