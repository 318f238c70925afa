"""``attrim report``: the architectures of finished runs as a picture."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from attrim.cli import options
from attrim.cli.screen import is_main, say
from attrim.core.plan import PruningPlan
from attrim.errors import InputError, MissingDependencyError
from attrim.report.figures import architecture
from attrim.ship.store import PLAN_FILE

__all__ = ["ARCHITECTURE_FILE", "draw_plan", "report"]

ARCHITECTURE_FILE = "architecture.svg"

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or plan files.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where the picture goes, .svg or .png; by default into the first run's folder."),
]


def report(runs: Runs, out: Out = None, debug: options.Debug = False) -> None:
    """Draw what runs have kept: a bar for each group of channels, dropped blocks hatched; several runs below each other.

    **Examples**

    ```
    attrim report runs/half
    attrim report runs/l2 runs/pcas --out comparison.svg
    ```
    """
    files = [path / PLAN_FILE if path.is_dir() else path for path in runs]
    missing = next((path for path, file in zip(runs, files, strict=True) if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"'{missing}' is neither a run (a folder with {PLAN_FILE}) nor a plan file.")
    plans = {_name(path, runs): PruningPlan.load(file) for path, file in zip(runs, files, strict=True)}
    target = out or files[0].parent / ARCHITECTURE_FILE
    architecture(None, plans if len(plans) > 1 else next(iter(plans.values()))).save(target)
    say(f"wrote {target}")


def draw_plan(plan: PruningPlan, folder: Path) -> None:
    """Put the picture of a plan into the folder of its run. Nothing is said where matplotlib is missing: a run needs no picture."""
    if not is_main():
        return
    target = folder / ARCHITECTURE_FILE
    target.unlink(missing_ok=True)
    if plan.groups:
        with suppress(MissingDependencyError):
            architecture(None, plan).save(target)


def _name(path: Path, runs: list[Path]) -> str:
    """The folder's own name where that tells the runs apart, else the path."""
    return path.name if [run.name for run in runs].count(path.name) == 1 else str(path)
