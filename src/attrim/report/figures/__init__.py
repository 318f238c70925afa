"""Figures as static SVG: plain data in, a :class:`Picture` out. Needs the extra ``report`` (matplotlib)."""

from attrim.report.figures.architecture import architecture
from attrim.report.figures.canvas import Picture

__all__ = ["Picture", "architecture"]
