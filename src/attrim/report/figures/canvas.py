"""What all figures share: one style, one palette, and :class:`Picture`, an SVG whose bytes repeat."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from attrim.core.plan import write_atomic
from attrim.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS", "CUT", "GRID", "INK", "KEPT", "LOST", "MARKERS", "SMALL", "WIDTH", "Picture", "finish", "new_figure", "shades",
    "styled",
]  # fmt: skip

WIDTH = 600 / 72
"""Inches; 800 pixels of a web page."""

SMALL = 8.0
"""Points; the smallest text, 10.7 pixels."""

INK, GRID, KEPT, LOST, CUT = "#222222", "#dddddd", "#0072b2", "#dcdcdc", "#d55e00"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito, told apart with every common colour blindness."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 72,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 1.0,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "attrim",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": SMALL,
    "ytick.color": INK,
    "ytick.labelsize": SMALL,
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A finished figure, 800 pixels wide on a page. The same data give the same bytes.

    Attributes:
        svg: the file's text; text stays text, images inside are rasters.
        title: what it shows.
        description: the same with the main numbers, for those who cannot see it (``alt`` text).
        figure: the ``matplotlib.figure.Figure``, for those who want to go on drawing.

    Example:
        >>> attrim.report.architecture(channels, plan).save("architecture.svg")
    """

    svg: str
    title: str
    description: str
    figure: Any = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.svg`` or ``.png`` (192 pixels an inch); the file appears whole or not at all.

        Raises:
            InputError: another ending.
        """
        target = Path(path)
        if target.suffix == ".svg":
            write_atomic(target, self.svg.encode())
        elif target.suffix == ".png":
            write_atomic(target, self._png())
        else:
            raise InputError(f"expected a file name that ends with .svg or .png, found '{target.name}'.")

    def _png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        file = io.BytesIO()
        with styled():
            FigureCanvasAgg(self.figure)
            self.figure.savefig(file, format="png", dpi=192, metadata={"Software": None})
        return file.getvalue()


@contextmanager
def styled() -> Iterator[None]:
    """A block in which matplotlib draws in the one style, whatever the program around has set; afterwards all is as before.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "drawing a figure") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of the common width.

    Args:
        height: inches; one is 96 pixels.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def finish(figure: Figure, title: str, description: str) -> Picture:
    """Turn a drawn figure into a picture; call inside :func:`styled`."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", dpi=144, metadata=nothing)
    text = file.getvalue()
    # Where DejaVu Sans is missing, Verdana has the same widths, so nothing overlaps.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    text = re.sub(r' (?:d|x|y)="[^"]*"', _rounded, text)
    start = text.index("<svg ")
    end = text.index(">", start)
    names = f"\n <title>{escape(title)}</title>\n <desc>{escape(description)}</desc>"
    text = f'{text[:end]} role="img"{text[end : end + 1]}{names}{text[end + 1 :]}'
    return Picture("\n".join(line.rstrip() for line in text.splitlines()) + "\n", title, description, figure)


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point: nothing that can be seen, and half the file."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])


def shades(count: int) -> list[Any]:
    """Colours from the first layer (dark) to the last (light), all visible on white."""
    import matplotlib
    import numpy as np

    ramp = matplotlib.colormaps["viridis"]
    return [ramp(v) for v in np.linspace(0.0, 0.85, max(count, 1))]
