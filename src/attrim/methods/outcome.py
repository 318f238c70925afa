"""What a method gives back, and what is known about a method before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.modules.gates import Gates

__all__ = ["Method", "MethodOutcome"]

GIVEN = ("budget", "loss", "folder", "resume", "seed", "holdout", "on_epoch", "augmented")
"""Arguments that every method takes; all other keywords are its own options."""


@dataclass(frozen=True, slots=True, eq=False)
class MethodOutcome:
    """What a method gives back.

    Attributes:
        plan: what to cut.
        model_to_cut: what to cut it from: the network itself, or a copy with the same shapes that the method has trained
            or folded its gates into.
        scores: what the plan was made from.
        log: what happened, in order, each with its ``step`` and figures.
        gates: the trained gates, or None.
        statistics: whatever else was measured, by name.
        reference: the uncut network that the small one should be like after recovery, where that is not ``model_to_cut``.
        channels: the map that plan and scores refer to, where it is not the one that was given.
    """

    plan: PruningPlan
    model_to_cut: nn.Module
    scores: Scores
    log: tuple[Mapping[str, Any], ...] = ()
    gates: Gates | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    reference: nn.Module | None = None
    channels: ChannelMap | None = None

    @property
    def aim(self) -> nn.Module:
        """What recovery without training fits the small network to."""
        return self.model_to_cut if self.reference is None else self.reference


@dataclass(frozen=True, slots=True)
class Method:
    """A method from a paper: it looks at a network and data, and says what to cut.

    Attributes:
        name: what is typed.
        function: ``(model, channels, batches, *, budget, loss=None, folder=None, resume=False, seed=0, holdout=None,
            on_epoch=None, augmented=None, **options) -> MethodOutcome``.
        summary: one line for people.
        source: the paper.
        needs_labels: whether the batches must hold labels, unless a ``loss`` is given.
        needs_data: whether ``batches`` are needed.
        trains: whether it changes the network's own weights before the cut.
    """

    name: str
    function: Callable[..., MethodOutcome]
    summary: str
    source: str
    needs_labels: bool = True
    needs_data: bool = True
    trains: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Option -> default, read from the function's signature."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in GIVEN
        }
