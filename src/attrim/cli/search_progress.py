"""How far a search is: best value so far, trials a minute, time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from attrim.cli.screen import is_main, note
from attrim.search.protocol import Trial

__all__ = ["SearchProgress"]

_EVERY = 15.0
"""Seconds between two lines where there is no terminal."""


class SearchProgress:
    """A bar on a terminal; elsewhere a line now and then. A context manager.

    Args:
        total: evaluations.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.best: float | None = None
        self._from: int | None = None
        self._begin = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> SearchProgress:
        console = Console(stderr=True)
        if console.is_terminal and is_main():
            columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            bar = Progress(*columns, console=console, transient=True)
            try:
                bar.start()
            except LiveError:
                return self
            self._bar = (bar, bar.add_task("", total=self.total))
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def trial(self, best: Trial | None) -> None:
        """Take in the best trial so far."""
        self.best = None if best is None else best.value

    def tick(self, done: int) -> None:
        """Take in how many evaluations are finished, by whomever; those of an earlier run do not count for the pace."""
        self.done = min(done, self.total)
        if self._from is None:
            self._from, self._begin = self.done, time.monotonic()
        now = time.monotonic()
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self.done, description=self.text())
        elif now - self._said >= _EVERY:
            self._said = now
            note(f"{self.done} of {self.total} candidates{self.text()}")

    def pace(self) -> float | None:
        """Evaluations a minute since this process began; None while that is unknown."""
        minutes, done = (time.monotonic() - self._begin) / 60, self.done - (self._from or 0)
        return done / minutes if done > 0 and minutes > 0 else None

    def text(self) -> str:
        """Best, pace, and time left."""
        pace = self.pace()
        best = "" if self.best is None else f", best {self.best:.4f}"
        if pace is None:
            return best
        left = (self.total - self.done) / pace
        return f"{best}, {pace:.1f} a minute, {_span(left)} left"


def _span(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
