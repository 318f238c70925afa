"""Nouns in, pages and tables out."""

from attrim.report.tables import Figures, Table, channel_table, comparison_table, pinned_table

__all__ = ["Figures", "Table", "channel_table", "comparison_table", "pinned_table"]
