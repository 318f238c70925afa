"""Searches that keep a population: artificial bee colony and evolution; and the control, random search."""

from __future__ import annotations

import numpy as np

from attrim.search.protocol import Proposals, Start
from attrim.search.space import FloatArray, Point, Space

__all__ = ["bee", "evolution", "random_search"]

_BATCH = 10
_LIMIT = 5
"""Failures after which a bee leaves its source."""
_PARENTS = 10
_MUTATED = 0.15
"""Share of the groups that a child redraws around its parents' ratios."""


def random_search(space: Space, start: Start, seed: int) -> Proposals:
    """The start, then independent uniform ratios in [0.1, 1], each projected on the budget.

    Source: random search as in EagleEye, Li et al., ECCV 2020.
    """
    random = np.random.default_rng(seed)
    here = yield from start(space)
    yield [here]
    while True:
        yield [_anywhere(space, random) for _ in range(_BATCH)]


def bee(space: Space, start: Start, seed: int) -> Proposals:
    """Artificial bee colony with ten sources: the start and nine random ones.

    Employed bees change two groups of their source by φ (x - x_k), φ uniform in [-1, 1], x_k another source; onlookers do the
    same at sources drawn by their rank; a source that did not improve five times is left for a random one.

    Source: Karaboga, 2005; Lin et al., ABCPruner, IJCAI 2020 (two groups, ten sources, limit five). Drawing by rank is ours.
    """
    random = np.random.default_rng(seed)
    here = yield from start(space)
    sources = [here, *(_anywhere(space, random) for _ in range(_BATCH - 1))]
    values = list((yield sources))
    tried = [0] * _BATCH
    while True:
        for onlooking in (False, True):
            order = np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1.0
            chosen = random.choice(_BATCH, _BATCH, p=order / order.sum()) if onlooking else np.arange(_BATCH)
            moved = [_visit(space, sources, int(i), random) for i in chosen]
            for i, point, value in zip(chosen.tolist(), moved, (yield moved), strict=True):
                if value > values[i]:
                    sources[i], values[i], tried[i] = point, value, 0
                else:
                    tried[i] += 1
        tired = [i for i in range(_BATCH) if tried[i] > _LIMIT]
        scouted = [_anywhere(space, random) for _ in tired]
        if scouted:
            for i, point, value in zip(tired, scouted, (yield scouted), strict=True):
                sources[i], values[i], tried[i] = point, value, 0


def evolution(space: Space, start: Start, seed: int) -> Proposals:
    """Ten parents, ten children a generation: uniform crossover, Gaussian mutation; the best ten of both stay.

    Source: a plain (μ + λ) evolution strategy, as surveyed in Bäck & Schwefel, Evolutionary Computation 1(1), 1993.
    """
    random = np.random.default_rng(seed)
    here = yield from start(space)
    parents = list(dict.fromkeys([here, *(_anywhere(space, random) for _ in range(_PARENTS - 1))]))
    values = list((yield parents))
    while True:
        children = [_child(space, parents, random) for _ in range(_BATCH)]
        both = dict(zip([*parents, *children], [*values, *(yield children)], strict=True))
        kept = sorted(both, key=lambda point: -both[point])[:_PARENTS]
        parents, values = kept, [both[point] for point in kept]


def _anywhere(space: Space, random: np.random.Generator) -> Point:
    return space.project(random.uniform(0.1, 1, len(space)))


def _visit(space: Space, sources: list[Point], i: int, random: np.random.Generator) -> Point:
    other = (i + 1 + int(random.integers(_BATCH - 1))) % _BATCH
    mine, theirs = space.ratios(sources[i]), space.ratios(sources[other])
    groups = random.choice(len(space), size=min(2, len(space)), replace=False)
    moved = mine.copy()
    moved[groups] += random.uniform(-1, 1, len(groups)) * (mine[groups] - theirs[groups])
    return space.project(np.clip(moved, 0, 1))


def _child(space: Space, parents: list[Point], random: np.random.Generator) -> Point:
    first, second = (_tournament(space, parents, random) for _ in range(2))
    ratios = np.where(random.random(len(space)) < 0.5, first, second)
    noise = np.where(random.random(len(space)) < _MUTATED, random.normal(0, 0.15, len(space)), 0)
    return space.project(np.clip(ratios + noise, 0, 1))


def _tournament(space: Space, parents: list[Point], random: np.random.Generator) -> FloatArray:
    """The better of two; the parents are sorted by value after the first generation, and arbitrary before."""
    return space.ratios(parents[int(random.integers(0, len(parents), 2).min())])
