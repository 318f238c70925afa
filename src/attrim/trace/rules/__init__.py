"""One table of operator rules. An operator that no rule knows pins everything that flows in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrim.trace.call import Call
from attrim.trace.rules import contract, move, normalise, pointwise, reduce, sizes
from attrim.trace.tracer import Tracer

__all__ = ["RULES", "Rule"]

Rule = Callable[[Tracer, Call], None]
"""Called after the operator ran; gives every output tensor its labels with ``tracer.set``."""

RULES: Mapping[str, Rule] = {
    **pointwise.RULES,
    **move.RULES,
    **sizes.RULES,
    **contract.RULES,
    **normalise.RULES,
    **reduce.RULES,
}
"""Operator name (without namespace, overload and in-place underscore) -> rule."""
