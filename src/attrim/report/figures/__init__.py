"""Figures as static SVG: plain data in, a :class:`Picture` out. Needs the extra ``report`` (matplotlib)."""

from attrim.report.figures.agreement import agreement_by_epoch, correlation_by_data, rank_correlation
from attrim.report.figures.architecture import architecture
from attrim.report.figures.bars import grouped_bars
from attrim.report.figures.canvas import Picture
from attrim.report.figures.histograms import attention_histograms
from attrim.report.figures.maps import attention_maps
from attrim.report.figures.policy import attention_between_layers, layer_attention, policy_costs, policy_map
from attrim.report.figures.search import proxy_scatter, search_curves
from attrim.report.figures.spectra import score_spectra
from attrim.report.figures.widths import kept_by_layer

__all__ = [
    "Picture",
    "agreement_by_epoch",
    "architecture",
    "attention_between_layers",
    "attention_histograms",
    "attention_maps",
    "correlation_by_data",
    "grouped_bars",
    "kept_by_layer",
    "layer_attention",
    "policy_costs",
    "policy_map",
    "proxy_scatter",
    "rank_correlation",
    "score_spectra",
    "search_curves",
]
