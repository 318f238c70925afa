"""Check every group in numbers, and pin those whose removal changes more than it should."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from attrim.core.channels import Reason
from attrim.trace.capture import Analysis, conclude
from attrim.trace.compare import TOLERANCE, compare, exact_part
from attrim.trace.probe import labels_of, random_cut, smallest
from attrim.trace.run import Run

__all__ = ["check_numbers"]


def check_numbers(analysis: Analysis) -> Analysis:
    """Cut random channels of all exact groups and compare with the masked original; bisect for groups that differ.

    What labels cannot see is a number that Python computed from a width (``x / x.shape[1]``): the cut network is coherent
    and still computes something else. Such a group is pinned.
    """
    while True:
        groups = [g for g, effects in enumerate(analysis.parts.effects) if not effects]
        if not groups or not _fails(analysis, groups):
            return analysis
        bad = smallest(groups, partial(_fails, analysis))
        reason = Reason(
            "removing its channels changes more than zeroing them does: a number in the code depends on the width "
            "(for example a mean written as a sum divided by x.shape[1])"
        )
        extra = [*analysis.extra, (labels_of(analysis, bad), reason)]
        run = Run(analysis.tracer, analysis.outputs)
        analysis = conclude(analysis.engine, analysis.space, analysis.labels, run, analysis.book, extra)


def _fails(analysis: Analysis, groups: Sequence[int]) -> bool:
    alive = exact_part(analysis, random_cut(analysis, groups))
    error, dtype, _ = compare(analysis, None, alive)
    return not np.isfinite(error) or error > (TOLERANCE if dtype == "float64" else 1e-3)
