"""One ratio for the whole network: the smallest scores go, wherever they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.cost import IntArray
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import AttrimWarning, BudgetError, InputError
from attrim.search.allocate import allocate
from attrim.search.decide import plan_from_kept
from attrim.search.limits import candidates

__all__ = ["check_reach", "check_size", "plan_by_ratio", "plan_within"]

PAPER_FLOOR = 0.05
"""Fraction of every group that stays when only a ratio is given."""


def plan_by_ratio(channels: ChannelMap, scores: Scores, ratio: float, budget: Budget | None = None) -> PruningPlan:
    """Remove the ``floor(ratio · N)`` channels with the smallest scores, ``N`` over all scored groups, then mind floors.

    Equal scores are removed from the highest index of the last group on. A group that would fall below its floor keeps its
    highest-scored channels; nothing else is removed in their place, so the masks of growing ratios are nested.

    Args:
        channels: the traced network.
        scores: of the groups that may shrink; a group of tied layers counts once.
        ratio: fraction of the channels that goes, in [0, 1): of channels, not of multiply-adds or parameters.
        budget: its ``min_keep``, ``max_removed``, ``multiple_of`` and ``frozen`` hold; its limits are not read. None keeps
            5 % of every group.

    Returns:
        The plan; its provenance holds ``threshold``, the smallest score that is not among the removed.

    Source:
        The global threshold of Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017;
        for PCAS this is our reading.
    """
    check_size(None, ratio)
    rules = budget or Budget(channels=1.0, min_keep=PAPER_FLOOR)
    free = candidates(channels, scores, rules)
    values = [scores.values[name].numpy() for name in free]
    flat = np.concatenate(values)
    order = np.lexsort((-np.arange(len(flat)), flat))
    gone = np.zeros(len(flat), bool)
    count = math.floor(ratio * len(flat) + 1e-9)
    gone[order[:count]] = True
    kept = {
        name: _mind_floor(value, part, rules)
        for name, value, part in zip(
            free, values, np.split(gone, np.cumsum([len(v) for v in values])[:-1]), strict=True
        )
    }
    notes = {"criterion": scores.criterion, "ratio": ratio, "threshold": float(flat[order[count]])}
    return plan_from_kept(channels, kept, notes)


def plan_within(channels: ChannelMap, scores: Scores, budget: Budget | None, ratio: float | None) -> PruningPlan:
    """By ratio where one is given, else the threshold that just meets the budget.

    Raises:
        InputError: neither, or a ratio beside limits that say something else.
    """
    check_size(budget, ratio)
    if ratio is None:
        return allocate(channels, scores, budget or Budget(channels=1.0))
    return plan_by_ratio(channels, scores, ratio, budget)


def check_size(budget: Budget | None, ratio: float | None) -> None:
    """Refuse a size that is not given, given twice, or out of its range; before anything is trained.

    Raises:
        InputError, BudgetError: as :func:`plan_within`.
    """
    if ratio is None:
        if budget is None:
            raise InputError(
                "how small? Pass budget=attrim.Budget(macs=0.5), or ratio=0.5, the fraction of channels to remove."
            )
        return
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise BudgetError(f"ratio: expected the fraction of channels that goes, in [0, 1), found {ratio!r}.")
    if budget is not None:
        other = budget.macs is not None or budget.params is not None
        if other or budget.channels is None or abs(budget.channels - (1 - ratio)) > 1e-9:
            raise InputError(
                f"ratio={ratio:g} removes that fraction of the channels, and the budget says something else. Leave one out, "
                f"or pass Budget(channels={1 - ratio:g}, ...), whose floors then hold."
            )


def check_reach(channels: ChannelMap, groups: Iterable[str], plan_of: Callable[[Scores], PruningPlan]) -> None:
    """Make a plan of made-up scores of ``groups`` now, so that what cannot be met is raised before all the training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttrimWarning)
        plan_of(Scores({id: torch.arange(channels[id].size) for id in groups}, "reach"))


def _mind_floor(values: np.ndarray, gone: np.ndarray, rules: Budget) -> IntArray:
    size = len(values)
    stays = max(size - int(gone.sum()), min(size, rules.floor(size)))
    if rules.multiple_of > 1:
        stays = min(size, max(rules.multiple_of, round(stays / rules.multiple_of) * rules.multiple_of))
    ranked = np.lexsort((np.arange(size), -values))
    return np.sort(ranked[:stays])
