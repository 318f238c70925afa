"""Probing: cut a random part of every group, run the cut copy, and find the first operator that goes astray.

A trace sees what a network did with one set of widths. Whether a size was computed, read from an attribute or written as a
constant shows only when a width changes. So a copy with random cuts (different counts in every group) is run on fake
tensors with the survivors' units as labels; the first operator whose result differs from the recorded one, survivors only,
is the place. Its site moves on to the next option; where there is none, the channels involved are pinned with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.errors import TraceError
from attrim.trace.capture import Analysis, Pins, conclude, record
from attrim.trace.labels import Checker, LabelSpace, Value
from attrim.trace.run import Engine, Run
from attrim.trace.tracer import SiteKey, Tracer

__all__ = ["Alive", "Astray", "Watcher", "coherence", "labels_of", "random_cut", "settle", "smallest"]

Alive = npt.NDArray[np.bool_]
"""label -> stays."""

_LIMIT = 400


@dataclass(frozen=True, slots=True)
class Astray:
    """The first operator of a pruned network that does not do what it did."""

    op: int
    reason: Reason


def settle(
    engine: Engine,
    space: LabelSpace,
    labels: Mapping[str, Sequence[IntArray | None]],
    start: Mapping[SiteKey, int] | None = None,
) -> Analysis:
    """Record and probe until a randomly cut copy runs coherently, from the decisions ``start`` on."""
    decisions: dict[SiteKey, int] = dict(start or {})
    tried: set[tuple[tuple[SiteKey, int], ...]] = set()
    extra: Pins = []
    astray = None
    for _ in range(_LIMIT):
        analysis = record(engine, space, labels, decisions, extra)
        if _dead_end(analysis, decisions, tried):
            continue
        if not analysis.parts.sizes.size:
            return analysis
        astray, number = _probe(analysis)
        if astray is None:
            return _numbers(analysis) if number else analysis
        while not _advance(analysis, decisions, astray.op, tried):
            extra += _culprits(analysis, astray)
            run = Run(analysis.tracer, analysis.outputs)  # more pins, the same run
            analysis = conclude(engine, space, labels, run, analysis.book, extra)
            if not analysis.parts.sizes.size:
                return analysis
            astray, number = _probe(analysis)
            if astray is None:
                return _numbers(analysis) if number else analysis
    raise TraceError(f"tracing did not settle after {_LIMIT} probes; last: {astray.reason if astray else ''}.")


def _numbers(analysis: Analysis) -> Analysis:
    """Mark the groups whose width shows up as a number in the code (``x / x.shape[1]``): inexact, with the line."""
    active = list(range(len(analysis.parts.sizes)))
    effects: list[tuple[IntArray, str]] = []
    while active:
        _, number = coherence(analysis, random_cut(analysis, active))
        if number is None:
            break
        bad = smallest(active, lambda part: coherence(analysis, random_cut(analysis, part))[1] is not None)
        effects += [
            (labels_of(analysis, [g]), f"a number computed from the width at {number.reason.source}") for g in bad
        ]
        active = [g for g in active if g not in bad]
    analysis.book.effects += effects
    run = Run(analysis.tracer, analysis.outputs)
    return conclude(analysis.engine, analysis.space, analysis.labels, run, analysis.book, analysis.extra)


def random_cut(analysis: Analysis, groups: Sequence[int] | None = None, flip: bool = False) -> Alive:
    """label -> stays. Random channels of every group (or of ``groups``) go, many from some groups and few from the others.

    Very different counts, so that widths which only happen to agree do not look tied; ``flip`` exchanges the two kinds.
    """
    parts = analysis.parts
    rng = np.random.default_rng(0)
    alive = np.ones(len(parts.units), bool)
    start = np.concatenate([[0], np.cumsum(parts.sizes)])
    stays = np.ones(int(start[-1]), bool)
    for g, size in enumerate(parts.sizes.tolist()):
        if bool(g % 2) != flip:
            count = int(rng.integers(max(1, (size + 1) // 2), size if size <= 4 else size - 1))
        else:
            count = int(rng.integers(min(1, size - 2), max(2, size // 4 + 1))) if size > 2 else 0
        gone = rng.permutation(size)[:count]
        if groups is None or g in groups:
            stays[start[g] + gone] = False
    held = parts.group_of >= 0
    alive[held] = stays[start[parts.group_of[held]] + parts.channel_of[held]]
    return alive


def _probe(analysis: Analysis) -> tuple[Astray | None, Astray | None]:
    """One random cut; a second one with the counts exchanged where pieces of one axis could be unequally wide."""
    astray, number = coherence(analysis, random_cut(analysis))
    pieces = any(key.kind in ("pieces", "slice") for sites in analysis.tracer.sites.values() for key, _ in sites)
    if astray is None and (pieces or (analysis.parts.sizes == 2).any()):  # a group of 2 loses one channel or none
        astray, more = coherence(analysis, random_cut(analysis, flip=True))
        number = number or more
    return astray, number


def coherence(analysis: Analysis, alive: Alive) -> tuple[Astray | None, Astray | None]:
    """Run a cut copy. First: the operator that did not do on the survivors what it did on the whole, or None. Second: a
    pointwise operator whose number changed with a width, or None."""
    units = analysis.parts.units
    keep: dict[str, dict[int, IntArray]] = {}
    carried: dict[str, list[IntArray | None]] = {}
    for name, vectors in analysis.labels.items():
        carried[name] = []
        for d, vector in enumerate(vectors):
            if vector is None:
                carried[name].append(None)
                continue
            stays = alive[vector]
            if not stays.all():
                keep.setdefault(name, {})[d] = np.flatnonzero(stays)
            kept = units[vector[stays]]
            carried[name].append(kept if kept.any() else None)
    attributes = analysis.attributes_at(alive)
    watch = Watcher(analysis, alive, units)
    try:
        run = analysis.engine.run(
            watch.book, carried, analysis.tracer.decisions, keep, attributes, guide=analysis.tracer, watch=watch
        )
    except Exception as error:  # an attribute table that refuses the cut
        return Astray(len(analysis.tracer.steps), Reason(f"{type(error).__name__}: {error}")), None
    return watch.verdict(run), watch.number


_OTHER_AXIS = ("along the channel axis", "picked by number")
"""Reasons that speak of an axis which is not the channels: a window, the three of q, k and v."""


class _Stop(Exception):
    """Ends a run whose verdict is known."""


class Watcher:
    """Follows a run on a cut network, operator by operator, beside the recorded run of the whole one."""

    def __init__(self, analysis: Analysis, alive: Alive, units: IntArray, stop_at_conflict: bool = True) -> None:
        self.analysis = analysis
        self.alive = alive
        self.units = units
        self.stop_at_conflict = stop_at_conflict
        self.book = Checker()
        self.in_step = True
        self.astray: Astray | None = None
        self.number: Astray | None = None
        # both runs keep their label vectors alive in their steps, so ids are names here
        self.expected: dict[int, IntArray] = {}
        self.compared: dict[tuple[int, int], bool] = {}

    def __call__(self, tracer: Tracer) -> None:
        """After each operator: end the run where it departs from the recorded one."""
        recorded = self.analysis.tracer
        op = tracer.op
        if self.in_step and op < len(recorded.steps):
            (name, was, _), (now_name, now, _) = recorded.steps[op], tracer.steps[op]
            if name != now_name:
                self.in_step = False  # another course of operators; ties still watch over it
            elif _inside_einsum(tracer):
                pass  # lays sizes of 1 out in its own way; what comes out of it is compared by whoever reads it
            elif len(was) != len(now) or any(map(self._differs, was, now)):
                text = "takes other positions once a width has changed"
                self.astray = Astray(op, Reason(text, *recorded.places[op]))
                raise _Stop
            elif self.number is None and recorded.numbers[op] != tracer.numbers[op]:
                was_number, number = recorded.numbers[op], tracer.numbers[op]
                text = f"a number in the code follows the width ({was_number} became {number})"
                self.number = Astray(op, Reason(text, *recorded.places[op]))
        if self.stop_at_conflict and self.book.conflicts:
            raise _Stop

    def _differs(self, before: tuple[tuple[int, ...], Value], after: tuple[tuple[int, ...], Value]) -> bool:
        """Whether a result is not what was recorded, survivors only."""
        (shape, value), (new_shape, new_value) = before, after
        if len(shape) != len(new_shape):
            return True
        for d, vector in enumerate(value.axes):
            if vector is None:
                if shape[d] != new_shape[d] and not value.indifferent(d):
                    return True
                continue
            expected = self._survivors(vector)
            if len(expected) != new_shape[d] or self._other(expected, new_value.axes[d]):
                return True
        return False

    def _survivors(self, vector: IntArray) -> IntArray:
        """The units that should be left of a recorded label vector; many operators share one."""
        if id(vector) not in self.expected:
            self.expected[id(vector)] = self.units[vector[self.alive[vector]]]
        return self.expected[id(vector)]

    def _other(self, expected: IntArray, actual: IntArray | None) -> bool:
        if actual is None:  # a single survivor's label may be lost on an axis of size 1
            return bool((expected != expected[0]).any())
        key = (id(expected), id(actual))
        if key not in self.compared:
            self.compared[key] = len(actual) != len(expected) or bool((actual != expected).any())
        return self.compared[key]

    def verdict(self, run: Run) -> Astray | None:
        """The first place at which the run went astray."""
        found = [Astray(c.op, c.reason) for c in self.book.conflicts[:1]]
        if self.astray is not None:
            found.append(self.astray)
        elif run.failure is not None and not isinstance(run.failure.error, _Stop):
            op, reason = run.failure.op, run.failure.reason
            places = self.analysis.tracer.places
            found.append(Astray(op, Reason(reason.text, *places[op]) if op < len(places) else reason))
        return min(found, key=lambda a: a.op) if found else None


def _inside_einsum(tracer: Tracer) -> bool:
    """Whether the operator was called by torch's own functional layer, as those of an einsum are."""
    return tracer.lines is not None and tracer.lines.inner[0].endswith(os.path.join("torch", "functional.py"))


def _advance(
    analysis: Analysis, decisions: dict[SiteKey, int], op: int, tried: set[tuple[tuple[SiteKey, int], ...]]
) -> bool:
    """Move the sites at an operator on, the last decided first, like an odometer; pinning comes after all else."""
    sites = [
        (key, options) for key, options in analysis.tracer.sites.get(op, []) if decisions.get(key, 0) < options - 1
    ]
    if not sites:
        return False
    if sites[0][0].kind != "split" and all(decisions.get(key, 0) >= options - 2 for key, options in sites):
        earlier = _split_upstream(analysis, decisions, op)
        if earlier is not None and _advance(analysis, decisions, earlier, tried):
            decisions.update({key: 0 for key, _ in sites})
            return True
    for key, options in reversed(sites):
        current = decisions.get(key, 0)
        if current < options - 2:
            decisions[key] = current + 1
            break
        decisions[key] = 0
    else:
        decisions.update({key: options - 1 for key, options in sites})
    state = tuple(sorted(decisions.items(), key=str))
    if state in tried:  # sites that share a line undo each other's choice
        decisions.update({key: options - 1 for key, options in sites})
    tried.add(state)
    return True


def _split_upstream(analysis: Analysis, decisions: Mapping[SiteKey, int], op: int) -> int | None:
    """The nearest earlier split of the same channels that has another option: a size may fail because of it."""
    mine = _roots_at(analysis, op)
    for earlier in range(op - 1, -1, -1):
        for key, options in analysis.tracer.sites.get(earlier, []):
            if key.kind == "split" and decisions.get(key, 0) < options - 2 and mine & _roots_at(analysis, earlier):
                return earlier
    return None


def _roots_at(analysis: Analysis, op: int) -> set[int]:
    """Connected channels on the results of an operator."""
    _, outs, _ = analysis.tracer.steps[op]
    return {
        int(r) for _, value in outs for v in value.axes if v is not None for r in np.unique(analysis.solution.roots[v])
    }


def _dead_end(analysis: Analysis, decisions: dict[SiteKey, int], tried: set[tuple[tuple[SiteKey, int], ...]]) -> bool:
    """Move on a split whose kept factor lies along a window or is tied into one piece: another factor may be the channels.

    A line that several modules run moves on only if it is a dead end for all of them.
    """
    places: dict[SiteKey, list[int]] = {}
    for op, sites in analysis.tracer.sites.items():
        for key, options in sites:
            if key.kind == "split" and decisions.get(key, 0) < options - 2:
                places.setdefault(key, []).append(op)
    for ops in places.values():
        if all(_stuck(analysis, op) for op in ops):
            return _advance(analysis, decisions, ops[0], tried)
    return False


def _stuck(analysis: Analysis, op: int) -> bool:
    """Whether no channel on the results of an operator can go, for a reason that another option may avoid."""
    roots = _roots_at(analysis, op)
    reasons = [analysis.solution.reasons.get(r) for r in roots]
    wrong = all(r is not None and any(text in r.text for text in _OTHER_AXIS) for r in reasons)
    return bool(roots) and (wrong or roots <= set(analysis.solution.roots[analysis.parts.lonely].tolist()))


def _culprits(analysis: Analysis, astray: Astray) -> Pins:
    """Labels to pin: those that meet at the operator, else the smallest set of groups that makes it fail."""
    parts = analysis.parts
    if astray.op < len(analysis.tracer.steps):
        _, outs, known = analysis.tracer.steps[astray.op]
        vectors = [v for value in (*known, *(value for _, value in outs)) for v in value.axes if v is not None]
        involved = np.unique(np.concatenate([np.zeros(0, np.int64), *vectors]))
        involved = involved[parts.group_of[involved] >= 0]
        if involved.size:
            groups = np.unique(parts.group_of[involved]).tolist()
            if coherence(analysis, random_cut(analysis, groups))[0] is not None:
                return [(involved, _cannot(astray))]
    groups = smallest(
        list(range(len(parts.sizes))), lambda part: coherence(analysis, random_cut(analysis, part))[0] is not None
    )
    return [(labels_of(analysis, groups), _cannot(astray))]


def labels_of(analysis: Analysis, groups: Sequence[int]) -> IntArray:
    """All labels of these groups."""
    return np.flatnonzero(np.isin(analysis.parts.group_of, np.asarray(groups)))


def _cannot(astray: Astray) -> Reason:
    r = astray.reason
    return Reason(f"the network does not run with a smaller width: {r.text}", r.operator, r.module, r.source)


def smallest(groups: list[int], fails: Callable[[list[int]], bool]) -> list[int]:
    """Bisect: a half that fails alone is followed; where neither half fails alone, all are named."""
    while len(groups) > 1:
        half = len(groups) // 2
        if fails(groups[:half]):
            groups = groups[:half]
        elif fails(groups[half:]):
            groups = groups[half:]
        else:
            break
    return groups
