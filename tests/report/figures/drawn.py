"""Reading figures back: the numbers that were drawn, the text of the SVG, and whether all is sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from matplotlib.backends.backend_agg import FigureCanvasAgg

from attrim.report.figures import Picture

SVG = "{http://www.w3.org/2000/svg}"
LIMIT = 200_000


def texts(picture: Picture) -> list[str]:
    """All text of the SVG, in order."""
    return ["".join(node.itertext()) for node in ElementTree.fromstring(picture.svg).iter(f"{SVG}text")]


def heights(axes: Any, label: str) -> list[float]:
    """Heights of the bars of one kind."""
    return [float(bar.get_height()) for c in axes.containers if c.get_label() == label for bar in c]


def sound(draw: Callable[[], Picture]) -> Picture:
    """Draw twice: the same bytes, well-formed, small, 800 pixels wide, with title and description, all on the page."""
    picture = draw()
    assert picture.svg == draw().svg
    assert len(picture.svg) < LIMIT
    root = ElementTree.fromstring(picture.svg)
    assert root.get("width") == "600pt"
    assert root.get("role") == "img"
    assert [root[0].tag, root[0].text] == [f"{SVG}title", picture.title]
    assert [root[1].tag, root[1].text] == [f"{SVG}desc", picture.description]
    assert picture.title
    assert picture.description.endswith(".")
    assert_on_page(picture)
    return picture


def assert_on_page(picture: Picture) -> None:
    """No text that was drawn is cut off at the page's edge, and none is smaller than 8 points."""
    figure, written = picture.figure, set(texts(picture))
    hidden = [label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _outside(axis)]
    page, renderer = figure.bbox, FigureCanvasAgg(figure).get_renderer()
    for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")):
        lines = [line for line in text.get_text().splitlines() if line.strip()]
        if not text.get_visible() or not lines or not written.issuperset(lines) or text in hidden:
            continue
        box = text.get_window_extent(renderer)
        assert text.get_fontsize() >= 8, text
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert inside, f"{text.get_text()!r} at {box} outside {page}"


def _outside(axis: Any) -> list[Any]:
    """Labels of ticks outside the axis' range: they exist and are not drawn."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
