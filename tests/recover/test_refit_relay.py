"""Jobs that wait for each other: their order, their errors, and their ends."""

from __future__ import annotations

import threading
import time

import pytest

from attrim.recover.refit.relay import relay


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def counting(count: int, log: list[str], name: str):
    def job(pause) -> None:
        try:
            for i in range(count):
                log.append(f"{name}{i}")
                pause(i)
            log.append(f"{name} ends")
        finally:
            log.append(f"{name} out")

    return job


def test_jobs_run_one_after_another_and_in_step():
    log: list[str] = []
    log.extend(f"shown {shown}" for shown in relay([counting(2, log, "a"), counting(2, log, "b")]))
    assert log == ["a0", "b0", "shown [0, 0]", "a1", "b1", "shown [1, 1]", "a ends", "a out", "b ends", "b out"]


def test_a_job_that_has_ended_shows_nothing():
    assert list(relay([counting(1, [], "a"), counting(3, [], "b")])) == [[0, 0], [None, 1], [None, 2]]


def test_no_job_and_jobs_without_a_pause():
    assert list(relay([])) == []
    assert list(relay([lambda pause: None, lambda pause: None])) == []


def test_only_one_job_runs_at_any_time():
    running, most = [0], [0]

    def job(pause) -> None:
        for _ in range(3):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.002)
            running[0] -= 1
            pause(threading.current_thread())

    threads = [{id(t) for t in shown} for shown in relay([job] * 4)]
    assert most == [1]
    assert len(threads[0]) == 4  # each has a thread of its own
    assert threads[0] == threads[1] == threads[2]


def test_an_error_in_a_job_is_raised_where_the_jobs_are_waited_for():
    log: list[str] = []

    def failing(pause) -> None:
        pause("first")
        raise ZeroDivisionError("in the job")

    shown: list[list] = []
    with pytest.raises(ZeroDivisionError, match="in the job"):
        shown.extend(relay([counting(5, log, "a"), failing]))
    assert shown == [[0, "first"]]
    assert log == ["a0", "a1", "a out"]


def test_abandoned_jobs_end_where_they_pause():
    log: list[str] = []
    steps = relay([counting(5, log, "a"), counting(5, log, "b")])
    assert next(steps) == [0, 0]
    steps.close()
    assert log == ["a0", "b0", "a out", "b out"]


def test_an_interrupt_of_the_one_who_waits_ends_the_jobs():
    log: list[str] = []

    def work() -> None:
        for _ in relay([counting(5, log, "a"), counting(5, log, "b")]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert log == ["a0", "b0", "a out", "b out"]


def test_an_interrupt_in_a_job_is_handed_on():
    def job(pause) -> None:
        raise KeyboardInterrupt

    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        list(relay([counting(2, log, "a"), job]))
    assert log == ["a0", "a out"]


def test_a_job_that_swallows_errors_is_ended_all_the_same():
    def stubborn(pause) -> None:
        try:
            pause(1)
        except Exception:  # a forward pass with a fallback
            pause("never")

    steps = relay([stubborn])
    assert next(steps) == [1]
    steps.close()
