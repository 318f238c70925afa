"""The same search against a real PostgreSQL server (`make test-db`)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import uuid

import pytest
from test_shared import alone, play, states, worth

import attrim
from attrim import Budget
from attrim.errors import InputError
from attrim.search.space import Space
from attrim.search.storage import open_storage
from nets import Residual, filled, image, random_scores

pytestmark = pytest.mark.db


@pytest.fixture(scope="module")
def server() -> str:
    address = os.environ.get("ATTRIM_TEST_DB")
    if not address:
        pytest.skip("ATTRIM_TEST_DB names no server: run make test-db")
    return address


@pytest.fixture(scope="module")
def space() -> Space:
    channels = attrim.trace(filled(Residual((8, 16), 2)), image(1, 3, 8, 8))
    return Space.of(channels, random_scores(channels), Budget(macs=0.5))


@pytest.fixture
def where(server) -> str:
    """An empty database of its own."""
    import sqlalchemy

    name = f"t{uuid.uuid4().hex[:12]}"
    url = server.replace("postgresql://", "postgresql+psycopg://")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.rpartition("/")[0] + "/" + name


def _worker(where, space, seconds: float, found, started) -> None:
    def value(kept):
        started.set()
        time.sleep(seconds)
        return worth(space, kept), {"pid": os.getpid()}

    result = play(where, space, value, evaluations=40)
    if found is not None:
        found.put((os.getpid(), result.best, result.value, [t.kept for t in result.trials]))


def _start(where, space, seconds, found=None):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_worker, args=(where, space, seconds, found, started))
    process.start()
    return process, started


def test_three_processes_evaluate_each_candidate_once(where, space) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    processes = [_start(where, space, 0.05, found)[0] for _ in range(3)]  # they make the tables at the same time, too
    results = [found.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    expected = alone(space, evaluations=40)
    for _, best, value, trials in results:
        assert (best, value) == (expected.best, expected.value)
        assert trials == [t.kept for t in expected.trials]
    import optuna

    study = optuna.load_study(study_name="study", storage=open_storage(where))
    complete = [t for t in study.get_trials() if t.state.name == "COMPLETE"]
    assert len(complete) == len({t.user_attrs["kept"] for t in complete}) == 40
    assert len({t.user_attrs["judged"]["pid"] for t in complete}) == 3
    assert study.best_value == expected.value


def test_a_killed_process_loses_one_candidate_and_it_is_taken_up(where, space) -> None:
    process, started = _start(where, space, 60.0)
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    begin = time.monotonic()
    found = play(where, space, lambda kept: (worth(space, kept), {}), evaluations=40)
    assert time.monotonic() - begin < 30
    process.join()
    assert found == alone(space, evaluations=40)
    assert states(where) == {"COMPLETE": 40, "FAIL": 1}


def test_the_whole_call_goes_on_from_another_folder(where, tmp_path) -> None:
    net = filled(Residual((8, 12), 2, classes=3)).eval()
    given = {"budget": Budget(macs=0.5), "criterion": "l2", "objective": sum_of_squares, "storage": where}
    first = attrim.search(net, image(1, 3, 8, 8), evaluations=15, folder=tmp_path / "a", **given)
    second = attrim.search(net, image(1, 3, 8, 8), evaluations=30, folder=tmp_path / "b", resume=True, **given)
    assert second.trials[:15] == first.trials
    assert second.study == first.study
    del given["storage"]
    assert second.trials == attrim.search(net, image(1, 3, 8, 8), evaluations=30, **given).trials


def sum_of_squares(kept) -> float:
    return -float(sum(count**2 for count in kept.values()))


def test_a_wrong_password_is_said_and_not_shown(server) -> None:
    with pytest.raises(InputError, match="password authentication failed") as caught:
        open_storage(server.replace(":attrim@", ":notthis@"))
    assert "notthis" not in str(caught.value)
