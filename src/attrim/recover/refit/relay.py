"""Forward passes that wait for each other: each runs in a thread of its own, one at a time, and pauses where it likes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

__all__ = ["Pause", "relay"]

Pause: TypeAlias = Callable[[Any], None]
"""Called by a job with something to show; returns when the job may go on."""


class _Abandoned(BaseException):
    """Ends a job that nobody waits for any more."""


class _Runner:
    """A job in a thread that only runs while it is waited for."""

    def __init__(self, job: Callable[[Pause], None]) -> None:
        self._job = job
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._shown: Any = None
        self._error: BaseException | None = None
        self._abandoned = False
        self.done = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self._job(self._pause)
        except _Abandoned:
            pass
        except BaseException as error:  # handed on to the one who waits
            self._error = error
        finally:
            self.done = True
            self._stopped.release()

    def _pause(self, value: Any) -> None:
        self._shown = value
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def advance(self) -> Any:
        """Run up to the next pause and return what is shown there; None at the end."""
        self._shown = None
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._shown

    def abandon(self) -> None:
        """End the job where it pauses."""
        if not self.done:
            self._abandoned = True
            self._go.release()
            self._stopped.acquire()
        self._thread.join()


def relay(jobs: Sequence[Callable[[Pause], None]]) -> Iterator[list[Any]]:
    """Run jobs in step: yields what all of them show at their first pause, then at their second, and so on.

    Only one job runs at any time, and none while the caller works on what was yielded. Jobs whose end has come show
    None. A job's error is raised here; all jobs are ended when the iteration is.

    Args:
        jobs: each is called with a function ``pause(value)``.

    Example:
        >>> def job(pause):
        ...     pause(1)
        ...     pause(2)
        >>> list(relay([job, job]))
        [[1, 1], [2, 2]]
    """
    runners = [_Runner(job) for job in jobs]
    try:
        while True:
            shown = [None if runner.done else runner.advance() for runner in runners]
            if all(runner.done for runner in runners):
                return
            yield shown
    finally:
        for runner in runners:
            runner.abandon()
