"""Where a run can be taken up in the middle, and what has to be at hand there."""

from __future__ import annotations

from dataclasses import dataclass

from attrim.methods.fast.recording import Key, Recording

__all__ = ["Boundary", "boundary", "changed_later"]


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """A place between two operators of a recorded run.

    Attributes:
        at: operators before this one are not to be run again, as far as they lie inside modules.
        skipped: calls that are not run; their outputs are handed out instead.
        real: calls of these whose outputs something after the boundary depends on; the others give any tensor of the shape.
        cloned: calls whose output is changed in place afterwards.
        invoked: path -> numbers of the calls that are made, or skipped, in a run from here, in order; calls inside skipped
            ones are absent.
    """

    at: int
    skipped: frozenset[Key]
    real: frozenset[Key]
    cloned: frozenset[Key]
    invoked: dict[str, tuple[int, ...]]

    @property
    def stubbed(self) -> set[str]:
        """Modules of which some call is skipped."""
        return {path for path, _ in self.skipped}


def boundary(recording: Recording, at: int) -> Boundary:
    """The boundary before operator ``at``.

    Skipped are the outermost module calls that were over by then. What lies between them (functions called directly) runs
    again, on real tensors where the rest depends on it.
    """
    calls, ops = recording.calls, recording.ops
    over = [0 <= call.end <= at and call.end > call.begin for call in calls]
    inside = [False] * len(calls)
    for i, call in enumerate(calls):
        if call.parent >= 0:
            inside[i] = inside[call.parent] or over[call.parent]
    outermost = [i for i in range(len(calls)) if over[i] and not inside[i]]
    again = [True] * at
    for i in outermost:
        again[calls[i].begin : calls[i].end] = [False] * (calls[i].end - calls[i].begin)
    needed = {storage for op in ops[at:] for storage in op.reads}
    needed |= calls[0].gives  # what the network returns
    changed = {storage for op in ops[at:] for storage in op.changes}
    for number in range(at - 1, -1, -1):
        if again[number] and (ops[number].escapes or ops[number].gives & needed):
            needed |= ops[number].reads
        if again[number]:
            changed |= ops[number].changes
    invoked: dict[str, tuple[int, ...]] = {}
    for i, call in enumerate(calls):
        if not inside[i]:
            path, number = call.key
            invoked[path] = (*invoked.get(path, ()), number)
    return Boundary(
        at,
        frozenset(calls[i].key for i in outermost),
        frozenset(calls[i].key for i in outermost if calls[i].gives & needed),
        frozenset(calls[i].key for i in outermost if calls[i].gives & changed),
        invoked,
    )


def changed_later(recording: Recording) -> frozenset[Key]:
    """Calls whose output some operator changes in place after they have given it."""
    last: dict[int, int] = {}
    for number, op in enumerate(recording.ops):
        for storage in op.changes:
            last[storage] = number
    return frozenset(c.key for c in recording.calls if any(last.get(s, -1) >= c.end for s in c.gives))
