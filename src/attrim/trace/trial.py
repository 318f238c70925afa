"""A trial run without branches: a branch that is offered is one without which the network runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from attrim.core.branches import Replacement
from attrim.errors import AttrimError
from attrim.modules.skips import without_modules
from attrim.trace.labels import Checker
from attrim.trace.run import Engine

if TYPE_CHECKING:
    from attrim.trace.capture import Analysis

__all__ = ["runs_without", "tried"]

_FUSED = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that hand the weights of their parts to one fused kernel, and so read what a stand-in does not have."""


def runs_without(analysis: Analysis, replacements: Mapping[str, Replacement]) -> str:
    """Run the network with these modules replaced; what went wrong, or ""."""
    engine = analysis.engine
    for path in replacements:
        for around in _around(path):
            if isinstance(engine.model.get_submodule(around), _FUSED):
                kind = type(engine.model.get_submodule(around)).__name__
                return f"torch's {kind} reads the weights of its parts itself (fused kernels), so none of them can go"
    try:
        base = without_modules(engine.model, tuple(replacements), replacements, engine.named.tensors)
        trial = Engine(base, engine.example)
        trial.real = engine.real
        blank: Mapping[str, Any] = {name: [None] * t.ndim for name, t in trial.named.tensors.items()}
        run = trial.run(Checker(), blank, {})
    except AttrimError as error:
        return str(error)
    if run.failure is not None:
        reason = run.failure.reason
        return f"the network does not run without it: {reason}"
    before, after = ([tuple(o.shape) for o in outputs] for outputs in (analysis.outputs, run.outputs))
    return "" if before == after else f"without it the network returns the shapes {after} instead of {before}"


def _around(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def tried(analysis: Analysis, candidates: Sequence[Mapping[str, Replacement]]) -> dict[int, str]:
    """The candidates (by position) without which the network does not run, with the reasons. All are tried together
    first; a failure is followed by halving."""
    bad: dict[int, str] = {}
    while True:
        left = [i for i in range(len(candidates)) if i not in bad]
        if not left:
            return bad
        why = _without(analysis, candidates, left)
        if not why:
            return bad
        while len(left) > 1:
            half = len(left) // 2
            for part in (left[:half], left[half:]):
                text = _without(analysis, candidates, part)
                if text:
                    left, why = part, text
                    break
            else:
                break
        bad.update(dict.fromkeys(left, why))


def _without(analysis: Analysis, candidates: Sequence[Mapping[str, Replacement]], chosen: Sequence[int]) -> str:
    return runs_without(analysis, {path: r for i in chosen for path, r in candidates[i].items()})
