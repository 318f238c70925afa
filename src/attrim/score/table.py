"""The table of criteria: plain data, for :func:`attrim.score` and for ``attrim methods``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from attrim.score.attention_map import arpruning
from attrim.score.fpgm import fpgm
from attrim.score.hrank import hrank
from attrim.score.kinds import Normalize, Reduction
from attrim.score.lamp import lamp
from attrim.score.obs import obs
from attrim.score.refit import refit
from attrim.score.taylor import taylor
from attrim.score.weights import bn_scale, l1, l2, random

__all__ = ["CRITERIA", "Criterion"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A named criterion.

    Attributes:
        name: what is typed.
        function: ``(model, channels, batches, *, reduction, **options)`` -> group id -> raw scores, shape ``(size,)``,
            larger is more important. Groups that it cannot score are absent.
        needs_data: whether ``batches`` are needed.
        needs_labels: whether the batches must hold labels.
        summary: one line for people.
        source: the paper.
        requires: what a group must have to be scored; completes "needs ...".
        reduction: across the members of a group, unless asked otherwise.
        normalize: within a group, unless asked otherwise.
    """

    name: str
    function: Callable[..., Mapping[str, Tensor]]
    needs_data: bool
    needs_labels: bool
    summary: str
    source: str
    requires: str = "a member with weights"
    reduction: Reduction = "mean"
    normalize: Normalize = "mean"


_ALL = (
    Criterion("random", random, False, False, "uniform numbers from a seed: the control", "", normalize="none"),
    Criterion("l1", l1, False, False, "sum of absolute weights of the filters", "Li et al., ICLR 2017"),
    Criterion("l2", l2, False, False, "Euclidean norm of the filters", "He et al., Soft Filter Pruning, IJCAI 2018"),
    Criterion(
        "lamp",
        lamp,
        False,
        False,
        "squared norm over the squared norms of all stronger channels",
        "Lee et al., ICLR 2021",
        reduction="sum",
        normalize="lamp",
    ),
    Criterion("fpgm", fpgm, False, False, "distance of a filter to all others of its group", "He et al., CVPR 2019"),
    Criterion(
        "bn_scale",
        bn_scale,
        False,
        False,
        "absolute scale of the norm after the filter",
        "Liu et al., Network Slimming, ICCV 2017",
        requires="a norm with a learnable scale among its members",
        normalize="none",
    ),
    Criterion(
        "taylor",
        taylor,
        True,
        True,
        "first-order change of the loss without the channel",
        "Molchanov et al., CVPR 2019",
        requires="a weight that the loss depends on (no no_grad or detach on the way)",
    ),
    Criterion(
        "hrank",
        hrank,
        True,
        False,
        "mean rank of the channel's feature maps",
        "Lin et al., HRank, CVPR 2020",
        requires="a module of its own that shows its channels as maps",
    ),
    Criterion(
        "obs",
        obs,
        True,
        False,
        "output error of the consumers after the best repair without the channel",
        "Hassibi & Stork, NIPS 1993; Meng et al., OSSCAR, ICML 2024",
        requires="consumers that multiply by a stored weight (convolution or matrix product)",
        reduction="sum",
    ),
    Criterion(
        "refit",
        refit,
        True,
        False,
        "rise of the consumers' error after refitting, channel by channel, for each multiply-add saved",
        "Hassibi & Stork, NIPS 1993; greedy order, place of comparison and price are ours",
        requires="consumers that multiply by a stored weight (convolution or matrix product)",
        reduction="sum",
        normalize="none",
    ),
    Criterion(
        "arpruning",
        arpruning,
        True,
        False,
        "change of the layer's attention map without the channel",
        "Yuan et al., ARPruning, Neural Networks 174, 2024 (our reading)",
        requires="a module of its own that shows its channels (with combine='bn_scale' also a norm with a scale)",
        normalize="none",
    ),
)

CRITERIA: Mapping[str, Criterion] = MappingProxyType({criterion.name: criterion for criterion in _ALL})
"""Name -> criterion. Not a registry: pass a callable, or your own table ``{**CRITERIA, "mine": ...}``."""
