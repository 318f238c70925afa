"""Progress: a bar with an estimate of the time left, for work that takes longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import cache
from typing import Any, TypeVar

__all__ = ["DELAY", "progress"]

T = TypeVar("T")

DELAY = 2.0
"""Seconds of work after which the bar appears."""


def progress(iterable: Iterable[T], description: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """Go through ``iterable``; after two seconds a bar on stderr shows the progress and the time left.

    Nothing is shown when ``rich`` is not installed, when stderr is not a terminal, or while another bar is up.

    Args:
        iterable: what to go through; it is not read ahead.
        description: what is being done, such as ``"scoring with taylor"``.
        total: number of items; its length is asked for when it has one. Without it the bar shows no time left.
        show: False to go through in silence.

    Example:
        >>> for batch in progress(loader, "recalibrating"):
        ...     model(batch)
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    begin = time.monotonic()
    bar: _Bar | None = None
    try:
        for done, item in enumerate(iterable):
            if show and time.monotonic() - begin > DELAY:
                bar = bar or _Bar(description, total)
                bar.advance(done)
            yield item
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    """A bar on the terminal, or nothing where there can be none."""

    def __init__(self, description: str, total: int | None) -> None:
        self.advance: Callable[[int], object] = _nothing
        self.close: Callable[[], object] = _nothing
        console = _console()
        if console is None or not console.is_terminal:
            return
        from rich.errors import LiveError
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
        task = bar.add_task(description, total=total)
        try:
            bar.start()
        except LiveError:
            return
        self.advance = lambda done: bar.update(task, completed=done)
        self.close = bar.stop


def _nothing(*_: Any) -> None:
    return None


@cache
def _console() -> Any:
    """One console for all bars, so that a bar inside a bar can be noticed; None without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=True)
