"""``attrim methods``: the criteria by name."""

from __future__ import annotations

from attrim.cli import options
from attrim.cli.screen import say, show
from attrim.methods.table import METHODS, Method
from attrim.report.tables import Table
from attrim.score import CRITERIA
from attrim.score.table import Criterion

__all__ = ["methods"]


def methods(debug: options.Debug = False) -> None:
    """List the methods that **attrim prune --method** takes, what they need, and where they come from.

    **Example**

    ```
    attrim methods
    ```
    """
    known: tuple[Criterion | Method, ...] = (*CRITERIA.values(), *METHODS.values())
    rows = tuple(
        (c.name, "labels" if c.needs_labels else "images" if c.needs_data else "nothing", c.summary, c.source or "-")
        for c in known
    )
    show(Table("Methods", ("name", "needs", "keeps the channels with the largest", "source"), rows))
    say(
        "Options are given as --option NAME=VALUE. Those of a criterion: reduction= and normalize=, and its own. Methods:"
    )
    for method in METHODS.values():
        say(f"  {method.name}: {', '.join(f'{name}={_text(value)}' for name, value in method.options.items())}")


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
