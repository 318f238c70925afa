"""Settings of a search beyond the usual ones, and a look at all of them before any work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.errors import InputError
from attrim.methods.objective import Metric, Objective
from attrim.methods.search_job import OBJECTIVES
from attrim.modules.batches import batch_source
from attrim.modules.progress import progress
from attrim.score.table import CRITERIA
from attrim.search.protocol import Start
from attrim.search.starts import STARTS

__all__ = ["Rules", "held", "objective_kind"]


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """Keywords of :func:`attrim.search` that are seldom needed.

    Attributes:
        augmented: training images as they are augmented in training, for the batch norms; ``data`` unless given.
        recalibration: how many batches of them are held in memory and used for every candidate; None for all.
        metric: ``(outputs, batch) -> float`` instead of top-1 accuracy, larger is better; ``naive`` only.
        refit: refit each candidate's layers by least squares before the batch norms are measured; ``naive`` only.
        early_stop: give candidates up that can hardly win any more; ``fast`` only.
        memory: bytes of activations that ``fast`` keeps so as not to compute them again, all processes of this call together;
            less makes it slower, 0 keeps none.
        start: ``uniform``, ``global`` (a threshold over the scores of all groups), ``sensitivity`` (one evaluation for each
            group), or a function of the form of :data:`attrim.search.protocol.Start`.
        settings: of the neighbourhood search: ``groups delta finest neighbours failures shift siblings``.
        channels: the channel map, if it is at hand.
        study: name of the study in the storage; made from all settings unless given.
        heartbeat: seconds between two signs of life of a process that evaluates.
        grace: seconds without one after which its trial is taken up by another. On the same machine a process that died is
            noticed at once.
        on_progress: called often, with the number of evaluations finished so far.
    """

    augmented: Iterable[Any] | None = None
    recalibration: int | None = 100
    metric: Metric | None = None
    refit: bool = False
    early_stop: bool = True
    memory: int = 4 << 30
    start: str | Start | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    channels: ChannelMap | None = None
    study: str | None = None
    heartbeat: float = 10.0
    grace: float = 60.0
    on_progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.start, str) and self.start not in STARTS:
            raise InputError(f"start: expected one of {', '.join(STARTS)}, found '{self.start}'.")
        for name in ("heartbeat", "grace"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise InputError(f"{name}: expected seconds > 0, found {value!r}.")
        if self.grace < 2 * self.heartbeat:
            raise InputError(
                f"grace: expected at least twice the heartbeat ({self.heartbeat:g} s), so that one late sign of life is no "
                f"death, found {self.grace:g} s."
            )
        room: Any = self.memory
        if isinstance(room, bool) or not isinstance(room, int) or room < 0:
            raise InputError(f"memory: expected a number of bytes >= 0, such as 4 << 30, found {room!r}.")
        number: Any = self.recalibration
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise InputError(f"recalibration: expected a number of batches >= 1, or None for all, found {number!r}.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> tuple[Rules, dict[str, Any]]:
        """Rules, and what is left: options of the criterion."""
        names = {f.name for f in dataclasses.fields(cls)}
        mine = {name: value for name, value in options.items() if name in names}
        return cls(**mine), {name: value for name, value in options.items() if name not in names}

    def begin(self, algorithm: Any) -> str | Start:
        """Where the search begins; the control ``global`` begins, and ends, at the global threshold."""
        return self.start or ("global" if algorithm == "global" else "uniform")


def objective_kind(
    objective: str | Objective | None,
    rules: Rules,
    *,
    budget: Any,
    criterion: Any,
    data: Any,
    holdout: Any,
    workers: Any,
) -> str | Objective:
    """Which objective is meant, once everything fits together.

    Raises:
        InputError: something is missing, of the wrong kind, or asked of an objective that cannot do it.
    """
    if not isinstance(budget, Budget):
        raise InputError(f"budget: expected an attrim.Budget, found {budget!r}. For example attrim.Budget(macs=0.5).")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InputError(f"workers: expected an int >= 1, found {workers!r}.")
    kind = objective or ("naive" if rules.metric is not None or rules.refit else "fast")
    if isinstance(kind, str) and kind not in OBJECTIVES:
        raise InputError(f"objective: expected {', '.join(OBJECTIVES)} or a function of kept counts, found '{kind}'.")
    if kind != "naive" and (rules.metric is not None or rules.refit):
        raise InputError("metric and refit are for objective='naive'. Leave objective out, or put them into your own.")
    for name, batches in (("data", data), ("augmented", rules.augmented)):
        if isinstance(batches, Iterator):
            raise InputError(
                f"{name}: expected batches that can be gone through again (a DataLoader, a list), found a generator. Pass "
                "list(batches)."
            )
    if isinstance(kind, str) and holdout is None:
        raise InputError(
            "holdout: candidates are judged on labelled training images that nothing was trained on. Pass holdout=batches, or "
            "an objective of your own."
        )
    reads = isinstance(criterion, str) and (criterion not in CRITERIA or CRITERIA[criterion].needs_data)
    if data is None and (reads or (isinstance(kind, str) and rules.augmented is None)):
        raise InputError("data: expected batches of training images, for the criterion and for the batch norms.")
    return kind


def held(batches: Iterable[Any] | None, what: str, limit: int | None = None) -> list[Any]:
    """Batches in memory: every candidate sees the same ones."""
    if batches is None:
        return []
    return list(progress(islice(batch_source(batches), limit), f"reading {what}"))
