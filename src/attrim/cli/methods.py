"""``attrim methods``: the criteria by name."""

from __future__ import annotations

from attrim.cli import options
from attrim.cli.screen import say, show
from attrim.report.tables import Table
from attrim.score import CRITERIA

__all__ = ["methods"]


def methods(debug: options.Debug = False) -> None:
    """List the methods that **attrim prune --method** takes, what they need, and where they come from.

    **Example**

    ```
    attrim methods
    ```
    """
    rows = tuple(
        (c.name, "labels" if c.needs_labels else "images" if c.needs_data else "nothing", c.summary, c.source or "-")
        for c in CRITERIA.values()
    )
    show(Table("Methods", ("name", "needs", "keeps the channels with the largest", "source"), rows))
    say("Options of a method are given as --option NAME=VALUE; all take reduction= and normalize=.")
