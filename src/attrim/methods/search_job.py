"""One search as a thing that can be carried out here, or sent to another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import InputError
from attrim.methods.fast.objective import FastObjective
from attrim.methods.fast.stops import Stop
from attrim.methods.fast.values import Judged
from attrim.methods.objective import Metric, NaiveObjective, Objective
from attrim.search.neighbourhood import neighbourhood_with
from attrim.search.protocol import Evaluate, Found, Search, Start, Trial, optimise
from attrim.search.ratio import SEARCHES, start_of
from attrim.search.shared import shared
from attrim.search.space import Point, Space
from attrim.search.storage import errors_of, open_storage
from attrim.search.trials import Judgement, Trials

__all__ = ["OBJECTIVES", "Ask", "Job", "Judge", "search_of"]

OBJECTIVES = ("fast", "naive")
"""Names of objectives."""

OnTrial = Callable[[int, Trial, "Trial | None"], None]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """How candidates are valued: everything an objective is made of.

    Attributes:
        kind: a name in :data:`OBJECTIVES`, or any callable ``(kept counts by group) -> float``.
        calibration, holdout: batches that are held in memory; not used by a callable.
        metric: instead of top-1.
        refit: least squares before the batch norms are measured.
        early_stop: give candidates up that can hardly win; ``fast`` only.
        memory: bytes of activations that one process keeps; ``fast`` only.
    """

    model: nn.Module
    channels: ChannelMap
    scores: Scores
    kind: str | Objective
    calibration: Sequence[Any] = ()
    holdout: Sequence[Any] = ()
    metric: Metric | None = None
    refit: bool = False
    early_stop: bool = True
    memory: int = 4 << 30

    def make(self) -> Objective:
        """The objective."""
        given = (self.model, self.channels, self.scores, self.calibration, self.holdout)
        if self.kind == "fast":
            return FastObjective(*given, stop=Stop() if self.early_stop else None, memory=self.memory)
        if self.kind == "naive":
            return NaiveObjective(*given, metric=self.metric, refit=self.refit)
        return self.kind  # type: ignore[return-value]


class Judge:
    """Calls an objective, which is made when the first value is needed, and hands on what was learned before."""

    def __init__(self, ask: Ask, space: Space) -> None:
        self._ask, self._space, self._names = ask, space, ask.channels.cost.groups
        self._earlier: list[Mapping[Point, Judgement]] = []
        self._objective: Any = None

    def __call__(self, point: Point) -> Judgement:
        """Value of a candidate, and what is to be kept of it."""
        objective = self._made()
        if hasattr(objective, "judge_one"):
            judged = objective.judge_one(self._kept(point))
            return float(judged.value), {name: value for name, value in asdict(judged).items() if name != "value"}
        value = objective(self._kept(point))
        try:
            return float(value), {}
        except (TypeError, ValueError) as error:
            raise InputError(f"objective: expected a float, found {value!r}.") from error

    def expect(self, points: Sequence[Point]) -> list[Point]:
        """Say which candidates come next; gives them back in the order that suits the objective."""
        objective = self._made()
        if not hasattr(objective, "expect"):
            return list(points)
        wanted = objective.expect([self._kept(point) for point in points]) or []
        chosen = set(wanted)
        return [*wanted, *(point for point in points if point not in chosen)]

    def learn(self, known: Mapping[Point, Judgement]) -> None:
        """Take in a batch, whoever judged it."""
        if self._objective is None:
            self._earlier.append(known)
        elif hasattr(self._objective, "learn"):
            found = {point: judged for point, (value, notes) in known.items() if (judged := _judged(value, notes))}
            self._objective.learn(found, self._space.fits)

    def _made(self) -> Any:
        if self._objective is None:
            self._objective = self._ask.make()
            for known in self._earlier:
                self.learn(known)
            self._earlier.clear()
        return self._objective

    def _kept(self, point: Point) -> dict[str, int]:
        return dict(zip(self._names, point, strict=True))


def _judged(value: float, notes: Mapping[str, Any]) -> Judged | None:
    """A record as it was before it was written down; None for one of another kind."""
    if not {"complete", "samples", "lesson"} <= set(notes):
        return None
    lesson = notes["lesson"]
    learned = None if lesson is None else (tuple(lesson[0]), tuple(lesson[1]), tuple(lesson[2]))
    return Judged(value, bool(notes["complete"]), int(notes["samples"]), learned)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Everything a process has to know to carry out, or join, a search.

    Attributes:
        where: storage of the trials; None keeps them nowhere.
        study: name of the study there.
        threads: for torch, or None to leave them alone.
    """

    space: Space
    ask: Ask
    algorithm: str | Search
    settings: Mapping[str, Any]
    start: str | Start
    seed: int
    evaluations: int
    where: str | None = None
    study: str = ""
    heartbeat: float = 10.0
    grace: float = 60.0
    threads: int | None = None
    storage: list[Any] = field(default_factory=list)

    def run(self, *, on_trial: OnTrial | None = None, tick: Callable[[int], None] | None = None) -> Found:
        """Carry the search out, with all processes that do the same.

        Args:
            on_trial: called with the number, the trial and the best so far, in the order of the search.
            tick: called at every look at the storage, with the number of finished trials there.
        """
        search = search_of(self.algorithm, self.settings)
        start = start_of(self.start, self.ask.scores) if isinstance(self.start, str) else self.start
        proposals = search(self.space, start, self.seed)

        def carry_out(evaluate: Evaluate) -> Found:
            return optimise(proposals, evaluate, self.space, evaluations=self.evaluations, on_trial=on_trial)

        judge = Judge(self.ask, self.space)
        if self.where is None:
            return carry_out(_alone(judge, tick))
        with errors_of(self.where):
            storage = self.storage[0] if self.storage else open_storage(self.where)
            trials = Trials(storage, self.study, self.space, heartbeat=self.heartbeat, grace=self.grace)

            return carry_out(shared(trials, judge, expect=judge.expect, learn=judge.learn, tick=tick))


def search_of(algorithm: str | Search, settings: Mapping[str, Any]) -> Search:
    """A search by name, with its settings.

    Raises:
        InputError: an unknown name, or settings that the search does not have.
    """
    if not isinstance(algorithm, str):
        if not callable(algorithm):
            raise InputError(f"algorithm: expected a name or a function (space, start, seed), found {algorithm!r}.")
        return algorithm
    if algorithm not in SEARCHES:
        raise InputError(f"algorithm: expected one of {', '.join(SEARCHES)}, found '{algorithm}'.")
    if not settings:
        return SEARCHES[algorithm]
    if algorithm != "neighbourhood":
        raise InputError(f"settings: the search '{algorithm}' has none, found {dict(settings)!r}.")
    known = ("groups", "delta", "finest", "neighbours", "failures", "shift", "siblings")
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(f"settings: expected {', '.join(known)}, found {', '.join(unknown)}.")
    return neighbourhood_with(**settings)


def _alone(judge: Judge, tick: Callable[[int], None] | None) -> Evaluate:
    done = 0

    def evaluate(points: Sequence[Point]) -> list[float]:
        nonlocal done
        known = {}
        for point in judge.expect(points):
            known[point] = judge(point)
            done += 1
            if tick is not None:
                tick(done)
        judge.learn({point: known[point] for point in points})
        return [known[point][0] for point in points]

    return evaluate
