"""``attrim report``: the architectures of finished runs as a picture, and what their methods did."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from attrim.cli import options
from attrim.cli.method_pictures import PICTURES, Drawn, method_pictures
from attrim.cli.screen import is_main, note, say
from attrim.core.plan import PruningPlan
from attrim.errors import AttrimError, InputError, MissingDependencyError
from attrim.report.figures import architecture
from attrim.ship.store import PLAN_FILE

__all__ = ["ARCHITECTURE_FILE", "draw_run", "report"]

ARCHITECTURE_FILE = "architecture.svg"

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or plan files.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Where the architecture goes, .svg or .png; by default all pictures go into the first run's folder.",
    ),
]


def report(runs: Runs, out: Out = None, debug: options.Debug = False) -> None:
    """Draw what runs have kept: a bar for each group of channels, dropped blocks hatched; several runs below each other.

    Of one run without --out, also what its method or search did, where there is more to see: policy, costs and attention of
    dcpa, agreement of globalpru, attention of pcas and cpsca, curve and keep ratios of attrim search.

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
    if out is None and len(runs) == 1 and runs[0].is_dir():
        for name in _draw(method_pictures(runs[0], plans[_name(runs[0], runs)]), runs[0]):
            say(f"wrote {runs[0] / name}")


def draw_run(plan: PruningPlan, folder: Path) -> None:
    """Put the pictures of a plan, and of how it came about, into the folder of its run; those of an earlier run go.

    Nothing is said where matplotlib is missing, and what cannot be drawn is only named: a run needs no picture.
    """
    if not is_main():
        return
    for name in (ARCHITECTURE_FILE, *PICTURES):
        (folder / name).unlink(missing_ok=True)
    with suppress(MissingDependencyError):
        if plan.groups:
            architecture(None, plan).save(folder / ARCHITECTURE_FILE)
        _draw(method_pictures(folder, plan), folder)


def _draw(pictures: Drawn, folder: Path) -> list[str]:
    """Names of those that could be drawn, and now are in the folder."""
    drawn = []
    for name, picture in pictures.items():
        try:
            picture().save(folder / name)
        except MissingDependencyError:
            raise
        except AttrimError as error:
            note(f"{name} is not drawn: {error}")
            continue
        drawn.append(name)
    return drawn


def _name(path: Path, runs: list[Path]) -> str:
    """The folder's own name where that tells the runs apart, else the path."""
    return path.name if [run.name for run in runs].count(path.name) == 1 else str(path)
