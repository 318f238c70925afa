"""Options of ``attrim search`` alone, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "Algorithm",
    "CriterionName",
    "EarlyStop",
    "Evaluations",
    "Memory",
    "ObjectiveName",
    "Recalibration",
    "Refit",
    "Setting",
    "StartName",
    "Storage",
    "StudyName",
    "Workers",
]

SEARCH, CANDIDATES, SHARING = "Search", "How candidates are judged", "Sharing the work"

CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        rich_help_panel=SEARCH,
        metavar="NAME",
        help="Which channels of a group stay; see attrim methods.",
    ),
]
Algorithm = Annotated[
    str,
    typer.Option(
        rich_help_panel=SEARCH,
        metavar="NAME",
        help="neighbourhood, random, bee, evolution, tpe, cmaes, nsga2, or the controls uniform and global.",
    ),
]
Evaluations = Annotated[
    int, typer.Option(rich_help_panel=SEARCH, metavar="N", help="Candidates in all; may be raised with --resume.")
]
StartName = Annotated[
    str | None,
    typer.Option("--start", rich_help_panel=SEARCH, metavar="NAME", help="uniform, global or sensitivity."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SEARCH,
        metavar="NAME=VALUE",
        help="Of the neighbourhood: groups, delta, neighbours … (repeatable).",
    ),
]
ObjectiveName = Annotated[
    str | None,
    typer.Option(
        "--objective",
        rich_help_panel=CANDIDATES,
        metavar="NAME",
        help="fast or naive. Default: fast, or naive with --refit.",
    ),
]
Recalibration = Annotated[
    int,
    typer.Option(
        rich_help_panel=CANDIDATES, metavar="N", help="Training batches on which batch norms are measured anew."
    ),
]
Refit = Annotated[
    bool, typer.Option("--refit", rich_help_panel=CANDIDATES, help="Refit the layers of each candidate first (slow).")
]
EarlyStop = Annotated[
    bool, typer.Option(rich_help_panel=CANDIDATES, help="Give candidates up that can hardly win any more.")
]
Memory = Annotated[
    float,
    typer.Option(
        rich_help_panel=CANDIDATES,
        metavar="GIB",
        help="Activations that --objective fast keeps, of all workers here; less is slower.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SHARING,
        metavar="URL|FILE",
        help="Where the trials lie: sqlite:///trials.db, postgresql://user@host/db, or a journal file. Default: in --out.",
    ),
]
StudyName = Annotated[
    str | None,
    typer.Option("--study", rich_help_panel=SHARING, metavar="NAME", help="Name of the study in the storage."),
]
Workers = Annotated[int, typer.Option(rich_help_panel=SHARING, metavar="N", help="Processes on this machine.")]
