"""Residual branches: the side of a sum that can vanish whole, and what stands in its place afterwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from attrim.core.channels import Member

__all__ = ["Branch", "Extent", "Kind", "Replacement", "Shortcut", "within"]

Kind = Literal["identity", "like", "zeros"]
Shortcut = Literal["identity", "computed"]


@dataclass(frozen=True, slots=True)
class Extent:
    """The length of one dimension of a tensor of zeros, as a function of the input it is made from.

    Attributes:
        source: the input's dimension that it follows, or -1.
        steps: what happens to that length, in order: each ``(m, a, b)`` makes ``(m * n + a) // b`` of ``n``. A convolution
            of kernel ``k``, stride ``s`` and padding ``p`` is ``(1, 2 p - k + s, s)``.
        size: the length where ``source`` is -1.
        channels: the length is a width that a cut may change; it is kept in the buffer ``zeros`` of the stand-in.
    """

    source: int = -1
    steps: tuple[tuple[int, int, int], ...] = ()
    size: int = 0
    channels: bool = False

    def at(self, n: int) -> int:
        """The length for an input of length ``n``."""
        for m, a, b in self.steps:
            n = (m * n + a) // b
        return n


@dataclass(frozen=True, slots=True)
class Replacement:
    """What stands in the place of a removed module; it has no parameters and costs no MACs.

    Attributes:
        kind: ``identity`` returns its input, ``like`` zeros of its input's shape, ``zeros`` zeros of the shape ``shape``.
        shape: one extent per dimension (``zeros`` only).
        returns: ``(index, length)`` where the module returned a tuple: the tensor's place in it and the tuple's length;
            the other places hold None.
    """

    kind: Kind = "identity"
    shape: tuple[Extent, ...] = ()
    returns: tuple[int, int] | None = None

    @property
    def width(self) -> int | None:
        """Length of the buffer ``zeros``, or None where the stand-in has none."""
        return next((e.size for e in self.shape if e.channels), None)

    def to_json(self) -> dict[str, Any]:
        """The layout of the plan file."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.kind == "zeros":
            data["shape"] = [_extent_to_json(e) for e in self.shape]
        if self.returns is not None:
            data["returns"] = list(self.returns)
        return data

    @classmethod
    def from_json(cls, data: Any) -> Replacement:
        """Read and check the layout of the plan file.

        Raises:
            ValueError: an unknown kind, an impossible extent or place.
        """
        kind = data["kind"]
        if kind not in get_args(Kind):
            raise ValueError(f"a replacement is of the kind {', '.join(get_args(Kind))}; found {kind!r}")
        shape = tuple(_extent_from_json(e) for e in data["shape"]) if kind == "zeros" else ()
        if sum(e.channels for e in shape) > 1:
            raise ValueError("a replacement has at most one dimension of channels")
        returns = None
        if "returns" in data:
            place, length = (int(n) for n in data["returns"])
            if not 0 <= place < length:
                raise ValueError(f"'returns': expected (place, length) with place < length, found ({place}, {length})")
            returns = (place, length)
        return cls(kind, shape, returns)


def _extent_to_json(extent: Extent) -> dict[str, Any]:
    if extent.source < 0:
        return {"channels" if extent.channels else "size": extent.size}
    steps = {"steps": [list(step) for step in extent.steps]} if extent.steps else {}
    return {"input": extent.source, **steps}


def _extent_from_json(data: Any) -> Extent:
    if "input" not in data:
        channels = "channels" in data
        size = int(data["channels" if channels else "size"])
        if size < 1:
            raise ValueError(f"an extent is at least 1, found {size}")
        return Extent(size=size, channels=channels)
    steps = tuple((int(m), int(a), int(b)) for m, a, b in data.get("steps", ()))
    if int(data["input"]) < 0 or any(b < 1 for _, _, b in steps):
        raise ValueError(f"an extent follows a dimension from 0 on and divides by 1 or more, found {data}")
    return Extent(int(data["input"]), steps)


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One side of a sum that can be removed whole: ``out = shortcut + branch`` becomes ``out = shortcut``.

    Removing it is exact: the smaller network computes what the original computes with the branch's output multiplied by
    zero at the sum.

    Attributes:
        id: stable name; the path of the block if it holds one branch, else of the heaviest module that goes.
        block: path of the module whose code takes the sum, "" for the model itself.
        modules: paths of the modules that go; nothing but the branch runs in them.
        shortcut: ``identity`` if the other side of the sum is what the branch starts from, else ``computed``.
        gate: path of the module whose output times ``g`` is the branch's output times ``g``, called once in a forward
            pass; "" where there is none.
        tensors: parameters and buffers that go with it.
        groups: channel groups that vanish with it; they need no cut.
        replacements: module path -> what stands in its place; together they remove the branch.
        widths: what the buffers ``zeros`` of the stand-ins are tied to: ``(group id, member)``.
        inside: id of the smallest branch that contains this one, or "".
        effects: why removing it would not be exact; empty for every branch that tracing finds.
        note: how it is removed, for people.
        source: ``file.py:line`` of the sum.
    """

    id: str
    block: str
    modules: tuple[str, ...]
    shortcut: Shortcut
    gate: str
    tensors: tuple[str, ...]
    replacements: Mapping[str, Replacement]
    groups: tuple[str, ...] = ()
    widths: tuple[tuple[str, Member], ...] = ()
    inside: str = ""
    effects: tuple[str, ...] = ()
    note: str = ""
    source: str = ""

    @property
    def exact(self) -> bool:
        """Whether removing it equals multiplying its output by zero at the sum."""
        return not self.effects

    def __repr__(self) -> str:
        return (
            f"Branch({self.id!r}, {len(self.modules)} modules, {len(self.tensors)} tensors, shortcut {self.shortcut}"
            f"{f', gate {self.gate!r}' if self.gate else ''}{f', inside {self.inside!r}' if self.inside else ''})"
        )


def within(name: str, paths: Collection[str]) -> bool:
    """Whether a module or a tensor, by name, lies in one of these modules or is one of them."""
    parts = name.split(".")
    return bool(paths) and any(".".join(parts[:n]) in paths for n in range(1, len(parts) + 1))
