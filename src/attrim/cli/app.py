"""The application: commands put together, and every failure turned into one readable paragraph."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer

from attrim.cli.demo import demo
from attrim.cli.evaluate import evaluate
from attrim.cli.finetune import finetune
from attrim.cli.methods import methods
from attrim.cli.prune import prune
from attrim.cli.report import report
from attrim.cli.screen import note, paragraph
from attrim.cli.search import search
from attrim.cli.trace import trace
from attrim.errors import AttrimError, AttrimWarning, InputError, MissingDependencyError

__all__ = ["app", "run"]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
)

INTERRUPTED = 130

_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"attrim {installed_version('attrim')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Physical, verified channel pruning for PyTorch.

    **attrim demo** shows the whole way in a minute. A command's own --help has examples.
    """


app.command()(demo)
app.command()(trace)
app.command()(prune)
app.command()(search)
app.command()(finetune)
app.command()(evaluate)
app.command()(report)
app.command()(methods)


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        0; 2 for wrong usage (an option, a file, a budget); 1 for any other failure; 130 when interrupted.

    Example:
        >>> run(["methods"])
        0
    """
    debug = "--debug" in arguments
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", AttrimWarning)
        warnings.showwarning = _show_warning
        try:
            status = typer.main.get_command(app).main(list(arguments), prog_name="attrim", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            status = INTERRUPTED
        except Exception as error:  # the last line of defence: a person reads this, not a program
            return _explain(error, debug)
    if status == INTERRUPTED:  # typer returns it, or raises, depending on its version
        paragraph("interrupted")
    return status if isinstance(status, int) else 0


def _explain(error: Exception, debug: bool) -> int:
    if debug and not isinstance(error, _UsageProblem):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, _UsageProblem):
        text = error.format_message()  # type: ignore[attr-defined]
        if text:  # empty when the help was shown instead
            paragraph(
                text if text.endswith((".", "?")) else f"{text}.", hint="attrim COMMAND --help shows the options."
            )
        return 2
    if isinstance(error, AttrimError):
        paragraph(str(error))
        return 2 if isinstance(error, InputError | MissingDependencyError) else 1
    hint = "" if debug else "Run the command again with --debug for the traceback."
    paragraph(f"unexpected {type(error).__name__}: {error or 'no details'}", hint=hint)
    return 1


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    note(str(message))
