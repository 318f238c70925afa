"""The ratio search as one call: how many channels each group keeps is tried out, which ones is up to a criterion."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.methods.objective import Objective, best_channels
from attrim.methods.scoring import score
from attrim.methods.search_job import Ask, Job, OnTrial, search_of
from attrim.methods.search_rules import Rules, held, objective_kind
from attrim.methods.search_study import Study, identity, plain
from attrim.methods.search_workers import run_with_workers
from attrim.search.decide import plan_from_kept
from attrim.search.protocol import Found, Search, Trial
from attrim.search.space import Space
from attrim.search.storage import JOURNAL
from attrim.trace.capture import analyse

__all__ = ["SearchResult", "search"]

Criterion = Callable[[nn.Module, ChannelMap, Iterable[Any] | None], Any]

_FRONT = ("nsga2",)
"""Searches of a front."""


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """What :func:`attrim.search` returns.

    Attributes:
        plan: the cut of the best candidate, for :func:`attrim.apply`.
        best: kept channels of every group.
        value: what the objective gave for it.
        trials: all evaluated candidates, in the order of the search.
        curve: the best value within the budget after each trial; ``-inf`` before the first.
        channels: the channel map.
        scores: which channels a group keeps first.
        study: name of the study, or None where the trials were kept nowhere.
        seconds: wall time of this call, scoring included.
    """

    plan: PruningPlan
    best: Mapping[str, int]
    value: float
    trials: tuple[Trial, ...]
    curve: tuple[float, ...]
    channels: ChannelMap
    scores: Scores
    study: str | None
    seconds: float

    @property
    def front(self) -> tuple[Trial, ...]:
        """Trials that no other one beats in value *and* MACs, cheapest first; what ``algorithm="nsga2"`` looks for."""
        cost = self.channels.cost
        priced = sorted(self.trials, key=lambda trial: (cost.macs(list(trial.kept)), -trial.value))
        best, found = float("-inf"), []
        for trial in priced:
            if trial.value > best:
                best = trial.value
                found.append(trial)
        return tuple(found)

    def __str__(self) -> str:
        return f"{self.plan.summary()}\nbest of {len(self.trials)} candidates: {self.value:.4f}"


def search(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    criterion: str | Scores | Criterion = "arpruning",
    data: Iterable[Any] | None = None,
    holdout: Iterable[Any] | None = None,
    algorithm: str | Search = "neighbourhood",
    evaluations: int = 300,
    objective: str | Objective | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    storage: str | Path | None = None,
    workers: int = 1,
    resume: bool = False,
    on_trial: OnTrial | None = None,
    **options: Any,
) -> SearchResult:
    """Search the width of every group: cut, measure the batch norms anew, look at held-out images, try other widths.

    The criterion ranks the channels within each group, once; the search decides how many stay. The same network, data, seed
    and number of evaluations give the same result, by one process or many, at once or after interruptions.

    Args:
        model: a trained network. Never changed.
        example_inputs: as for :func:`attrim.trace`.
        budget: what every candidate keeps (``nsga2`` looks above it too; its result keeps it).
        criterion: name, scores, or a callable as for :func:`attrim.score`. Groups without scores stay whole.
        data: training images, for the criterion and for the batch norms.
        holdout: labelled training images that nothing was trained on; held in memory. Never test images.
        algorithm: ``neighbourhood random bee evolution tpe cmaes nsga2``, the controls ``uniform`` and ``global``, or any
            function of the form of :class:`attrim.search.protocol.Search`.
        evaluations: different candidates that are evaluated in all; a finished search goes on when it is raised.
        objective: ``fast``, ``naive``, or a callable ``(kept channels by group) -> float``, larger is better, which needs no
            ``holdout``.
        seed: of the search.
        folder: of the run; keeps the trials in ``trials.journal``.
        storage: another place for them: a journal file, ``sqlite:///…``, ``postgresql://…``. The same call with ``resume=True``
            takes part, on any machine.
        workers: processes on this machine. The script then needs ``if __name__ == "__main__":``.
        resume: go on with a search that was begun, or take part in one under way.
        on_trial: called with the number, the trial and the best so far, in the order of the search.
        options: fields of :class:`attrim.methods.search_rules.Rules` (``augmented recalibration metric refit early_stop memory
            start settings channels study heartbeat grace on_progress``); all others are the criterion's.

    Raises:
        BudgetError, CriterionError, DataError, InputError: arguments that do not fit.
        CheckpointError: trials are there and ``resume`` is False; they belong to another search; the storage failed.
        MissingDependencyError: Optuna or the driver of a database is not installed.

    Source: T. Yuan et al., ARPruning, Neural Networks 174, 2024; ``docs/methods/arpruning.md`` says what is certain.

    Example:
        >>> found = attrim.search(model, x, budget=attrim.Budget(macs=0.5), data=train, holdout=held, evaluations=100)
        >>> small = attrim.apply(model, found.plan)
    """
    begin = time.monotonic()
    rules, own = Rules.of(options)
    search_of(algorithm, rules.settings)
    kind = objective_kind(
        objective, rules, budget=budget, criterion=criterion, data=data, holdout=holdout, workers=workers
    )
    asked = _Asked(model, budget, criterion, own, algorithm, rules, seed, evaluations, kind, workers)
    with ExitStack() as stack:
        where = _where(storage, folder, workers, resume, stack)
        channels = rules.channels or analyse(model, example_inputs).channel_map()
        job = asked.job(channels, data, holdout, where, resume)
        found = run_with_workers(job, workers, on_trial=on_trial, tick=rules.on_progress)
    return asked.result(job, found, time.monotonic() - begin)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What was asked for."""

    model: nn.Module
    budget: Budget
    criterion: str | Scores | Criterion
    options: Mapping[str, Any]
    algorithm: str | Search
    rules: Rules
    seed: int
    evaluations: int
    kind: str | Objective
    workers: int

    def job(self, channels: ChannelMap, data: Any, holdout: Any, where: str | None, resume: bool) -> Job:
        """Everything made ready, the scores included."""
        rules = self.rules
        source = rules.augmented if rules.augmented is not None else data
        named = isinstance(self.kind, str)
        calibration = held(source, "calibration images", rules.recalibration) if named else []
        judged = held(holdout, "held-out images") if named else []
        study = None
        if where is not None:
            about = identity(self.model, channels, self.budget, self._settings(len(calibration), len(judged)))
            study = Study(where, about, name=rules.study, resume=resume, front=self.algorithm in _FRONT)

        def compute() -> Scores:
            if isinstance(self.criterion, Scores):
                return self.criterion
            return score(self.model, channels, self.criterion, data, **self.options)

        scores = compute() if study is None else study.scores(compute)
        ask = Ask(
            self.model,
            channels,
            scores,
            self.kind,
            calibration,
            judged,
            rules.metric,
            rules.refit,
            rules.early_stop,
            rules.memory // self.workers,
        )
        return Job(
            Space.of(channels, scores, self.budget),
            ask,
            self.algorithm,
            rules.settings,
            rules.begin(self.algorithm),
            self.seed,
            self.evaluations,
            where,
            "" if study is None else study.name,
            rules.heartbeat,
            rules.grace,
            storage=[] if study is None else [study.storage],
        )

    def result(self, job: Job, found: Found, seconds: float) -> SearchResult:
        """The plan of the best candidate, and the rest."""
        channels, scores = job.ask.channels, job.ask.scores
        limits = {name: value for name, value in dataclasses.asdict(self.budget).items() if value is not None}
        notes = {
            "criterion": scores.criterion,
            "budget": {**limits, "frozen": list(self.budget.frozen)},
            "search": {
                "algorithm": plain(self.algorithm),
                "start": plain(job.start),
                "seed": self.seed,
                "evaluations": len(found.trials),
                "value": found.value,
            },
        }
        return SearchResult(
            plan=plan_from_kept(channels, best_channels(channels, scores, found.best), notes),
            best=dict(zip(channels.cost.groups, found.best, strict=True)),
            value=found.value,
            trials=found.trials,
            curve=tuple(found.curve),
            channels=channels,
            scores=scores,
            study=job.study or None,
            seconds=seconds,
        )

    def _settings(self, calibration: int, holdout: int) -> dict[str, Any]:
        rules = self.rules
        return {
            "criterion": self.criterion,
            "options": dict(self.options),
            "algorithm": self.algorithm,
            "settings": dict(rules.settings),
            "start": rules.begin(self.algorithm),
            "seed": self.seed,
            "objective": self.kind,
            "metric": rules.metric,
            "refit": rules.refit,
            "early_stop": rules.early_stop and self.kind == "fast",
            "batches": [calibration, holdout],
        }


def _where(
    storage: str | Path | None, folder: str | Path | None, workers: int, resume: bool, stack: ExitStack
) -> str | None:
    """Where the trials go: as told, into the folder of the run, or nowhere; of several processes, into one place."""
    if storage is not None:
        return str(storage)
    if folder is not None:
        return str(Path(folder) / JOURNAL)
    if resume:
        raise InputError("resume=True goes on with the trials in a folder or a storage. Pass folder= or storage=.")
    return None if workers == 1 else str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / JOURNAL)
