"""The table of ratio searches, and the two that only evaluate where they start."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrim.core.scores import Scores
from attrim.search.neighbourhood import neighbourhood
from attrim.search.population import bee, evolution, random_search
from attrim.search.protocol import Proposals, Search, Start
from attrim.search.sampled import cmaes, nsga2, tpe
from attrim.search.space import Space
from attrim.search.starts import sensitivity, threshold, uniform

__all__ = ["SEARCHES", "only_start", "start_of"]


def only_start(space: Space, start: Start, seed: int) -> Proposals:
    """Evaluates the start and ends: the controls ``uniform`` and ``global``."""
    yield [(yield from start(space))]


SEARCHES: Mapping[str, Search] = MappingProxyType(
    {
        "neighbourhood": neighbourhood,
        "uniform": only_start,
        "global": only_start,
        "random": random_search,
        "bee": bee,
        "evolution": evolution,
        "tpe": tpe,
        "cmaes": cmaes,
        "nsga2": nsga2,
    }
)
"""Name -> search. Not a registry: any function of the form of :class:`attrim.search.protocol.Search` does as well."""


def start_of(name: str, scores: Scores) -> Start:
    """The start with one of the names in :data:`attrim.search.starts.STARTS`; the scores place the global threshold."""
    return {"uniform": uniform, "global": threshold(scores), "sensitivity": sensitivity()}[name]
