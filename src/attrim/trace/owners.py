"""What belongs to which branch: operators, tensors and groups that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from attrim.core.channels import ChannelGroup
from attrim.core.plan import within
from attrim.trace.branches import Found
from attrim.trace.graph import Graph

__all__ = ["Owners", "group_owner", "owners"]


@dataclass(slots=True)
class Owners:
    """What belongs to which branch, the smallest one that takes it along; -1 or missing: to none.

    Attributes:
        ids: the branches.
        inside: branch -> the smallest that contains it.
        ops: operator -> branch.
        tensors: tensor name -> branch.
    """

    ids: tuple[str, ...] = ()
    inside: tuple[int, ...] = ()
    ops: dict[int, int] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)


def owners(graph: Graph | None, found: Sequence[Found]) -> Owners:
    """Which operators and tensors go with which branch."""
    ids = tuple(f.branch.id for f in found)
    known = Owners(ids, tuple(ids.index(f.branch.inside) if f.branch.inside else -1 for f in found))
    by_size = sorted(range(len(found)), key=lambda i: -len(found[i].region.ops))  # the smallest has the last word
    for i in by_size:
        known.tensors.update(dict.fromkeys(found[i].branch.tensors, i))
        if graph is not None:
            ops = (n for n in found[i].region.ops if within(graph.ops[n].path, found[i].removed))
            known.ops.update(dict.fromkeys(ops, i))
    return known


def group_owner(group: ChannelGroup, known: Owners) -> int:
    """The smallest branch with which a group vanishes wholly, or -1."""
    chains = [_chain(known.tensors.get(member.axis.tensor, -1), known) for member in group.members]
    return next((i for i in chains[0] if all(i in chain for chain in chains)), -1)


def _chain(branch: int, known: Owners) -> list[int]:
    """A branch and those that contain it, outwards."""
    chain = []
    while branch >= 0:
        chain.append(branch)
        branch = known.inside[branch]
    return chain
