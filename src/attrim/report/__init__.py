"""Nouns in, pages, tables and figures out. All figures are in :mod:`attrim.report.figures`."""

from attrim.report.figures import Picture, architecture
from attrim.report.tables import (
    Figures,
    Table,
    branch_table,
    channel_table,
    comparison_table,
    pinned_table,
    sum_table,
)

__all__ = [
    "Figures",
    "Picture",
    "Table",
    "architecture",
    "branch_table",
    "channel_table",
    "comparison_table",
    "pinned_table",
    "sum_table",
]
