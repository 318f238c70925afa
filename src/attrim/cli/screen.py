"""What people see: tables on the standard output, notes and errors on the standard error output."""

from __future__ import annotations

import os
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from attrim.report.tables import Table

__all__ = ["is_main", "note", "output", "paragraph", "say", "show"]

PLAIN_WIDTH = 110
"""Columns when the output is a file or a pipe and COLUMNS does not say."""


def is_main() -> bool:
    """Whether this process speaks and writes: the only one, or the first of those that a launcher started together."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def output() -> Console:
    """The standard output, wide enough for tables when it is not a terminal."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(file=sys.stdout, width=PLAIN_WIDTH if wide else None, highlight=False)


def show(table: Table) -> None:
    """Print a table; long cells fold, nothing is cut off."""
    if not is_main():
        return
    grid = Grid(title=escape(table.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.columns):
        number = i in table.right
        grid.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell) for cell in row))
    console = output()
    with console.capture() as printed:
        console.print(grid)
    for line in printed.get().rstrip().splitlines():
        sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.write("\n")


def say(text: str) -> None:
    """One line of result."""
    if is_main():
        output().print(Text(text), soft_wrap=True)


def note(text: str) -> None:
    """One line that is no result: progress, a warning."""
    if is_main():
        _errors().print(Text(text, style="dim"), soft_wrap=True)


def paragraph(text: str, *, hint: str = "") -> None:
    """An error, as one paragraph."""
    whole = Text("attrim: ", style="bold red") + Text(" ".join(text.split()), style="")
    if hint:
        whole += Text(f" {hint}")
    _errors().print(whole, soft_wrap=True)


def _errors() -> Console:
    return Console(file=sys.stderr, highlight=False)
