"""One search by several processes: nothing twice, nothing lost when one is killed, the same result as alone."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import attrim
from attrim import Budget
from attrim.errors import InputError, MissingDependencyError
from attrim.search.alive import Beats, Process
from attrim.search.protocol import one_by_one, optimise
from attrim.search.ratio import SEARCHES
from attrim.search.shared import shared
from attrim.search.space import Space
from attrim.search.starts import uniform
from attrim.search.storage import hide_password, open_storage
from attrim.search.trials import Trials
from nets import Residual, filled, image, random_scores

pytest.importorskip("optuna")

STUDY = "study"


@pytest.fixture(scope="module")
def space() -> Space:
    channels = attrim.trace(filled(Residual((8, 16), 2)), image(1, 3, 8, 8))
    return Space.of(channels, random_scores(channels), Budget(macs=0.5))


@pytest.fixture(params=["journal", "sqlite"])
def where(request, tmp_path) -> str:
    path = tmp_path / "trials.journal"
    return str(path) if request.param == "journal" else f"sqlite:///{tmp_path / 'trials.db'}"


def worth(space: Space, kept) -> float:
    weights = np.random.default_rng(1).lognormal(0, 1, len(space))
    return -float((weights * (1 - space.ratios(kept)) ** 2).sum())


def play(where, space, value, *, evaluations=25, algorithm="neighbourhood", seed=0, grace=60.0, heartbeat=10.0):
    """What each process does."""
    storage = open_storage(where)
    Trials.create(storage, STUDY)
    trials = Trials(storage, STUDY, space, heartbeat=heartbeat, grace=grace)
    return optimise(SEARCHES[algorithm](space, uniform, seed), shared(trials, value), space, evaluations=evaluations)


def alone(space, *, evaluations=25, algorithm="neighbourhood", seed=0):
    objective = one_by_one(lambda kept: worth(space, kept))
    return optimise(SEARCHES[algorithm](space, uniform, seed), objective, space, evaluations=evaluations)


def study_of(where):
    import optuna

    return optuna.load_study(study_name=STUDY, storage=open_storage(where))


def states(where) -> Counter:
    return Counter(trial.state.name for trial in study_of(where).get_trials())


@pytest.mark.parametrize("algorithm", ["neighbourhood", "random", "bee", "evolution", "tpe", "cmaes"])
def test_a_shared_search_finds_what_one_alone_finds(tmp_path, space, algorithm) -> None:
    where = str(tmp_path / "t.journal")
    expected = alone(space, algorithm=algorithm)
    assert play(where, space, lambda kept: (worth(space, kept), {}), algorithm=algorithm) == expected
    never = play(where, space, lambda kept: pytest.fail("evaluated twice"), algorithm=algorithm)
    assert never == expected


def test_trials_are_readable_with_optuna_alone(where, space) -> None:
    found = play(where, space, lambda kept: (worth(space, kept), {"colour": "red"}), evaluations=12)
    study = study_of(where)
    assert states(where) == {"COMPLETE": 12}
    assert study.best_value == found.value
    names = [space.cost.groups[g] for g in space.free]
    assert study.best_params == {name: found.best[g] for name, g in zip(names, space.free, strict=True)}
    assert study.best_trial.user_attrs["kept"] == ",".join(map(str, found.best))
    assert study.best_trial.user_attrs["judged"]["colour"] == "red"
    assert study.best_trial.user_attrs["judged"]["seconds"] >= 0
    assert study.best_trial.user_attrs["worker"]["pid"] == os.getpid()


def test_an_interrupted_search_goes_on_where_it_was(where, space) -> None:
    done = []

    def until(kept):
        if len(done) == 14:
            raise KeyboardInterrupt
        done.append(kept)
        return worth(space, kept), {}

    with pytest.raises(KeyboardInterrupt):
        play(where, space, until)
    assert states(where) == {"COMPLETE": 14, "FAIL": 1}
    rest = []
    found = play(where, space, lambda kept: (rest.append(kept), (worth(space, kept), {}))[1])
    assert found == alone(space)
    assert len(rest) == 25 - 14
    assert not set(rest) & set(done)
    longer = play(where, space, lambda kept: (worth(space, kept), {}), evaluations=30)
    assert longer == alone(space, evaluations=30)


def test_two_threads_share_the_work_and_evaluate_nothing_twice(where, space) -> None:
    done, found = [], []

    def value(kept):
        done.append((kept, threading.get_ident()))
        time.sleep(0.01)
        return worth(space, kept), {}

    threads = [threading.Thread(target=lambda: found.append(play(where, space, value))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone(space)] * 2
    assert len(done) == len({kept for kept, _ in done}) == 25
    assert min(Counter(ident for _, ident in done).values()) >= 6


def _slow_worker(where, space, log: str, seconds: float) -> None:
    def value(kept):
        with Path(log).open("a") as file:
            file.write(json.dumps(kept) + "\n")
        time.sleep(seconds)
        return worth(space, kept), {}

    play(where, space, value)


def _begun(log: Path) -> list:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_killed_process_is_noticed_at_once_and_its_candidate_taken_up(where, space, tmp_path) -> None:
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=_slow_worker, args=(where, space, str(log), 60.0))
    process.start()
    while not _begun(log):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # a dead child that nobody has asked after is dead as well
    begin = time.monotonic()
    found = play(where, space, lambda kept: (worth(space, kept), {}))
    assert time.monotonic() - begin < 10
    assert found == alone(space)
    assert states(where) == {"COMPLETE": 25, "FAIL": 1}
    process.join()


def test_a_process_that_fell_silent_elsewhere_is_given_up_after_a_while(where, space, monkeypatch) -> None:
    storage = open_storage(where)
    Trials.create(storage, STUDY)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["attrim.search.alive"], "_machine", lambda: "another machine")
        there = Trials(storage, STUDY, space)
        first = next(SEARCHES["uniform"](space, uniform, 0))[0]
        claim = there.claim(first)
    begin = time.monotonic()
    found = play(where, space, lambda kept: (worth(space, kept), {}), algorithm="uniform", grace=0.5)
    assert time.monotonic() - begin > 0.5
    assert found.best == first
    assert not there.finish(claim, 5.0, {})  # too late: the other value stands
    assert not there.beat(claim, 1)
    assert study_of(where).best_value == found.value != 5.0


def test_a_slow_process_that_gives_signs_of_life_keeps_its_candidate(where, space) -> None:
    told = threading.Event()

    def slow(kept):
        told.set()
        time.sleep(0.8)
        return 3.0, {}

    def work():
        play(where, space, slow, algorithm="uniform", heartbeat=0.05)

    thread = threading.Thread(target=work)
    thread.start()
    told.wait()
    other = play(where, space, lambda kept: pytest.fail("taken from the living"), algorithm="uniform", grace=0.4)
    thread.join()
    assert other.value == 3.0
    assert states(where) == {"COMPLETE": 1}


def test_of_two_claims_the_earlier_one_holds(where, space) -> None:
    storage = open_storage(where)
    assert Trials.create(storage, STUDY)
    assert not Trials.create(storage, STUDY)
    first, second = (Trials(open_storage(where), STUDY, space) for _ in range(2))
    point = next(SEARCHES["uniform"](space, uniform, 0))[0]
    claim = first.claim(point)
    assert second.claim(point) is None
    assert first.finish(claim, -math.inf, {"complete": False})
    assert second.claim(point) is None
    second.refresh()
    assert second.known == {point: (-math.inf, {"complete": False})}
    assert states(where) == {"COMPLETE": 1, "FAIL": 2}


def test_a_failing_objective_leaves_its_candidate_free(where, space) -> None:
    def broken(kept):
        raise ZeroDivisionError("no luck")

    with pytest.raises(ZeroDivisionError):
        play(where, space, broken)
    assert study_of(where).get_trials()[0].user_attrs["note"] == "ZeroDivisionError: no luck"
    assert play(where, space, lambda kept: (worth(space, kept), {})) == alone(space)


def test_every_process_learns_the_same_in_the_same_order(where, space) -> None:
    storage = open_storage(where)
    Trials.create(storage, STUDY)
    lessons = []
    for name in ("first", "second"):
        trials, learned = Trials(storage, STUDY, space), []
        evaluate = shared(
            trials, lambda kept, name=name: (worth(space, kept), {"by": name}), learn=lambda k, to=learned: to.append(k)
        )
        optimise(SEARCHES["bee"](space, uniform, 0), evaluate, space, evaluations=25)
        lessons.append([[(p, v, notes["by"]) for p, (v, notes) in known.items()] for known in learned])
    assert lessons[0] == lessons[1]
    found = alone(space, algorithm="bee")
    assert [(t.kept, t.value, "first") for t in found.trials] == [entry for batch in lessons[0] for entry in batch]


def test_nan_is_hopeless(where, space) -> None:
    found = play(where, space, lambda kept: (math.nan if kept[1] > 5 else 1.0, {}), evaluations=20)
    assert found.value == 1.0
    assert {t.value for t in found.trials} == {1.0, -math.inf}


def test_the_front_keeps_the_macs_beside_the_value(tmp_path, space) -> None:
    where = str(tmp_path / "t.journal")
    storage = open_storage(where)
    Trials.create(storage, STUDY, front=True)
    trials = Trials(storage, STUDY, space)
    evaluate = shared(trials, lambda kept: (worth(space, kept), {}))
    found = optimise(SEARCHES["nsga2"](space, uniform, 0), evaluate, space, evaluations=120)
    assert found == alone(space, algorithm="nsga2", evaluations=120)
    macs = [space.cost.macs(list(t.kept)) / space.cost.macs() for t in found.trials]
    assert min(macs) < 0.45
    assert max(macs) > 0.55
    assert [t.feasible for t in found.trials] == [m <= 0.5 for m in macs]
    best = study_of(where).best_trials
    assert len(best) > 5
    assert all(len(t.values) == 2 for t in best)
    assert found.value == max(t.value for t in found.trials if t.feasible)


def test_a_torn_last_line_of_a_journal_is_left_out(tmp_path, space) -> None:
    where = tmp_path / "t.journal"
    play(where, space, lambda kept: (worth(space, kept), {}), evaluations=10)
    with where.open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    assert play(where, space, lambda kept: (worth(space, kept), {}), evaluations=20) == alone(space, evaluations=20)


def test_wrong_storages_are_explained(tmp_path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_storage(tmp_path)
    with pytest.raises(InputError, match=r"cannot open 'nothing://x'.*Expected the path of a journal file"):
        open_storage("nothing://x")
    with pytest.raises(InputError, match=r"cannot open 'sqlite:////no/such/folder/t\.db'"):
        open_storage("sqlite:////no/such/folder/t.db")
    with pytest.raises((InputError, MissingDependencyError)) as caught:
        open_storage("postgresql://me:secret@127.0.0.1:1/none")
    assert "postgresql" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://me@host/db"),
        ("postgresql+psycopg://me:p%40w:x@host:5/db", "postgresql+psycopg://me@host:5/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("a@b:c", "a@b:c"),
    ],
)
def test_passwords_are_hidden(url, shown) -> None:
    assert hide_password(url) == shown


def test_processes_know_whether_another_one_is_there() -> None:
    me = Process.me()
    assert not me.is_gone()
    assert Process.read(me.note()) == me
    assert Process.read(json.loads(json.dumps(me.note()))) == me
    assert Process.read("pid 3") is None
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    child.start()
    pid = child.pid
    child.join()
    assert Process(me.machine, pid, "1").is_gone()
    assert not Process("another", pid, "1").is_gone()
    assert Process(me.machine, me.pid, me.started + "0").is_gone()  # the number was given to another process since


def test_beats() -> None:
    beats = Beats(grace=0.05)
    assert not beats.stopped(1, 0)
    time.sleep(0.1)
    assert not beats.stopped(1, 1)
    assert not beats.stopped(1, 1)
    time.sleep(0.1)
    assert beats.stopped(1, 1)
    assert not beats.stopped(2, 1)
