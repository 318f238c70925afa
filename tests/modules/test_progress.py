from __future__ import annotations

import builtins
import io

import pytest
from rich.console import Console

from attrim.modules import progress as module
from attrim.modules.progress import progress


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """A terminal of 100 columns, and no wait before the bar appears."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    monkeypatch.setattr(module, "_console", lambda: console)
    monkeypatch.setattr(module, "DELAY", -1.0)
    return text


def test_items_go_through_unchanged_and_one_at_a_time() -> None:
    taken = []

    def source():
        for i in range(3):
            taken.append(i)
            yield i

    going = progress(source(), "counting")
    assert taken == []
    assert next(going) == 0
    assert taken == [0]
    assert list(going) == [1, 2]


def test_quick_work_shows_nothing(terminal, monkeypatch) -> None:
    monkeypatch.setattr(module, "DELAY", 2.0)
    assert list(progress(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert terminal.getvalue() == ""


def test_long_work_shows_what_how_far_and_the_time_left(terminal) -> None:
    assert list(progress(range(5), "counting sheep")) == [0, 1, 2, 3, 4]
    shown = terminal.getvalue()
    assert "counting sheep" in shown
    assert "/5" in shown
    assert "left" in shown


def test_the_total_can_be_given(terminal) -> None:
    assert list(progress(iter([1, 2]), "x", total=77)) == [1, 2]
    assert "/77" in terminal.getvalue()


def test_it_can_be_silenced(terminal) -> None:
    assert list(progress(range(3), "x", show=False)) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_the_bar_is_gone_after_an_error_and_when_left_early(terminal) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            [1 // (1 - i) for i in progress(range(3), "x")]
        going = progress(range(3), "y")
        next(going)
        going.close()
    assert terminal.getvalue().rstrip().endswith("\x1b[2K")


def test_a_bar_inside_a_bar_does_not_fail(terminal) -> None:
    pairs = [(i, j) for i in progress(range(2), "outer") for j in progress(range(2), "inner")]
    assert pairs == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_no_terminal_no_bar(monkeypatch) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=False)
    monkeypatch.setattr(module, "_console", lambda: console)
    monkeypatch.setattr(module, "DELAY", -1.0)
    assert list(progress(range(3), "x")) == [0, 1, 2]
    assert text.getvalue() == ""


def test_without_rich_it_still_works(monkeypatch) -> None:
    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(module, "DELAY", -1.0)
    module._console.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_rich)
    try:
        assert list(progress(range(3), "x")) == [0, 1, 2]
    finally:
        module._console.cache_clear()
