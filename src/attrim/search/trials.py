"""The trials of one search in an Optuna study, shared by any number of processes on any number of machines."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attrim.search.alive import Beats, Process
from attrim.search.space import Point, Space
from attrim.search.storage import import_optuna, quiet

__all__ = ["Claim", "Judgement", "Trials"]

Judgement = tuple[float, Mapping[str, Any]]
"""Value of a candidate, and what else its judge wants to be kept: plain values."""

_POINT, _TOKEN, _WORKER, _BEAT, _NOTE, _JUDGED = "kept", "token", "worker", "beat", "note", "judged"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to evaluate one candidate: its trial runs in this process's name."""

    point: Point
    id: int


@dataclass(slots=True)
class _Seen:
    """What the study holds: finished candidates, and the running trial of others by its number."""

    known: dict[Point, Judgement] = field(default_factory=dict)
    running: dict[Point, int] = field(default_factory=dict)


class Trials:
    """A study, read and written with nothing but Optuna's public storage calls.

    A candidate is claimed by writing a running trial for it; of several the one with the lowest number holds, which the
    storage decides, and the others step back before they evaluate anything. A trial carries its worker and a beat; when
    the worker has ended, or its beat stopped, the trial is marked as failed and the candidate is free again.

    Args:
        storage: from :func:`attrim.search.storage.open_storage`.
        study: name of the study, which must exist (:meth:`create`).
        space: names the groups.
        heartbeat: seconds between two beats.
        grace: seconds without a beat after which a trial on another machine is taken up again.
    """

    def __init__(self, storage: Any, study: str, space: Space, *, heartbeat: float = 10.0, grace: float = 60.0) -> None:
        optuna = import_optuna("sharing the trials of a search")
        self._states, self._make = optuna.trial.TrialState, optuna.trial.create_trial
        self._finished_elsewhere = optuna.exceptions.UpdateFinishedTrialError
        self._out_of_reach = optuna.exceptions.StorageInternalError
        with quiet():
            self._study = optuna.load_study(study_name=study, storage=storage, sampler=optuna.samplers.RandomSampler())
        self._storage, self._space, self.heartbeat = storage, space, heartbeat
        self._id = storage.get_study_id_from_name(study)
        self._two = len(self._study.directions) == 2
        self._names = [space.cost.groups[g] for g in space.free]
        distribution = optuna.distributions.IntDistribution
        self._distributions = {
            name: distribution(int(space.floors[g]), int(space.cost.sizes[g]))
            for name, g in zip(self._names, space.free.tolist(), strict=True)
        }
        self._me = Process.me()
        self._beats = Beats(grace)
        self._seen = _Seen()

    @staticmethod
    def create(storage: Any, study: str, *, front: bool = False) -> bool:
        """Make a study, if there is none of that name; whether it was made now.

        Args:
            storage: where.
            study: its name.
            front: with the MACs as a second value, to be minimised.
        """
        optuna = import_optuna("keeping the trials of a search")
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        try:
            with quiet():
                storage.create_new_study([up, down] if front else [up], study)
        except optuna.exceptions.DuplicatedStudyError:
            return False
        return True

    @property
    def known(self) -> Mapping[Point, Judgement]:
        """Finished candidates, as of the last :meth:`refresh`."""
        return self._seen.known

    @property
    def running(self) -> Mapping[Point, int]:
        """Candidates that some process works on, as of the last :meth:`refresh`."""
        return self._seen.running

    def refresh(self) -> None:
        """Read what others have done."""
        seen = _Seen()
        for trial in self._study.get_trials(deepcopy=False):
            text = trial.user_attrs.get(_POINT)
            if text is None:
                continue
            point: Point = tuple(map(int, text.split(",")))
            if trial.state == self._states.COMPLETE:
                seen.known.setdefault(point, (trial.values[0], trial.user_attrs.get(_JUDGED, {})))
            elif trial.state == self._states.RUNNING:
                seen.running.setdefault(point, trial.number)
        self._seen = seen

    def claim(self, point: Point) -> Claim | None:
        """The right to evaluate ``point``, or None if another process has it."""
        token = uuid.uuid4().hex
        kept = dict(zip(self._names, (point[g] for g in self._space.free), strict=True))
        notes = {_POINT: ",".join(map(str, point)), _TOKEN: token, _WORKER: self._me.note(), _BEAT: 0}
        trial = self._make(state=self._states.RUNNING, params=kept, distributions=self._distributions, user_attrs=notes)
        claim = Claim(point, self._storage.create_new_trial(self._id, trial))
        for other in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING, self._states.COMPLETE)):
            if other.user_attrs.get(_POINT) == notes[_POINT]:
                if other.user_attrs.get(_TOKEN) == token:
                    return claim
                self.give_up(claim, "another process was first")
                return None
        return None

    def finish(self, claim: Claim, value: float, notes: Mapping[str, Any]) -> bool:
        """Write a value down; False if the trial was taken for dead meanwhile, and then the other's value counts."""
        values = [value, self._macs(claim.point)] if self._two else [value]
        try:
            self._storage.set_trial_user_attr(claim.id, _JUDGED, dict(notes))
            self._storage.set_trial_state_values(claim.id, self._states.COMPLETE, values)
        except self._finished_elsewhere:
            return False
        return True

    def give_up(self, claim: Claim, reason: str) -> None:
        """Free a candidate again without a value."""
        self._fail(claim.id, reason)

    def beat(self, claim: Claim, number: int) -> bool:
        """Give a sign of life; False if the trial is over."""
        try:
            self._storage.set_trial_user_attr(claim.id, _BEAT, number)
        except self._finished_elsewhere:
            return False
        except self._out_of_reach:  # the next beat may get through; finish() says it aloud if none does
            return True
        return True

    def bury(self) -> int:
        """Free the candidates of processes that are dead; how many there were."""
        dead = 0
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            worker = Process.read(trial.user_attrs.get(_WORKER))
            silent = self._beats.stopped(trial.number, trial.user_attrs.get(_BEAT))
            if worker == self._me or not (silent or (worker is not None and worker.is_gone())):
                continue
            number = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
            dead += self._fail(number, "its process died")
        return dead

    def _fail(self, id: int, reason: str) -> bool:
        try:
            self._storage.set_trial_user_attr(id, _NOTE, reason)
            self._storage.set_trial_state_values(id, self._states.FAIL)
        except self._finished_elsewhere:
            return False
        return True

    def _macs(self, point: Point) -> float:
        cost = self._space.cost
        return cost.macs(list(point)) / max(1, cost.macs())
