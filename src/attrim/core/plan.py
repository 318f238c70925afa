"""A pruning plan: plain data that says which positions of which tensors stay. JSON in, JSON out, no pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from attrim.core.branches import Replacement, within
from attrim.core.selection import Selection, read_selects
from attrim.errors import PlanError

__all__ = ["PLAN_VERSION", "AttributeCut", "Cut", "PruningPlan", "within", "write_atomic"]

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays of one tensor.

    Attributes:
        shape_before: the tensor's shape before the cut.
        keep: dimension -> kept indices, ascending.
    """

    shape_before: tuple[int, ...]
    keep: Mapping[int, tuple[int, ...]]

    @property
    def shape_after(self) -> tuple[int, ...]:
        """The tensor's shape after the cut."""
        return tuple(len(self.keep[d]) if d in self.keep else n for d, n in enumerate(self.shape_before))


@dataclass(frozen=True, slots=True)
class AttributeCut:
    """A number of a module that follows the cut, such as ``num_heads``."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Which positions of which tensors stay. ``cuts``, ``drops``, ``selects`` and ``attributes`` are normative.

    Attributes:
        fingerprint: digest of the names and shapes of the model that the plan was made for.
        cuts: tensor name -> cut.
        drops: paths of the modules of residual branches that are removed whole.
        attributes: module path -> attribute -> value before and after (head counts, widths kept as numbers).
        groups: group id -> what was decided, for people.
        provenance: how the plan came about (criterion, budget, costs, fingerprint after), for people and for ``then``.
        replacements: dropped module -> what stands in its place; one that is not named becomes an identity. A buffer of a
            replacement is cut like any tensor, as ``PATH.zeros``.
        selects: layer -> the positions of its input that it reads, where the input itself stays whole. Its weight is cut to
            them in ``cuts``.

    Example:
        >>> plan.save("plan.json"); plan = PruningPlan.load("plan.json")
        >>> plan.cuts["layer1.0.conv1.weight"].keep[0]
        (0, 2, 5, 7)
    """

    fingerprint: str
    cuts: Mapping[str, Cut]
    drops: tuple[str, ...] = ()
    attributes: Mapping[str, Mapping[str, AttributeCut]] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    selects: Mapping[str, Selection] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, in the file's layout."""
        return {
            "version": PLAN_VERSION,
            "fingerprint": self.fingerprint,
            "cuts": {
                name: {
                    "shape_before": list(cut.shape_before),
                    "keep": {str(d): list(kept) for d, kept in sorted(cut.keep.items())},
                }
                for name, cut in self.cuts.items()
            },
            "drops": list(self.drops),
            **({"replacements": {p: r.to_json() for p, r in self.replacements.items()}} if self.replacements else {}),
            **({"selects": {p: s.to_json() for p, s in self.selects.items()}} if self.selects else {}),
            "attributes": {
                module: {name: {"before": cut.before, "after": cut.after} for name, cut in cuts.items()}
                for module, cuts in self.attributes.items()
            },
            "groups": dict(self.groups),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any, source: str = "the plan") -> PruningPlan:
        """Read and check the JSON form.

        Raises:
            PlanError: the layout is wrong (the entry is named) or the version is newer than this attrim.
        """
        if not isinstance(data, dict) or "version" not in data or "cuts" not in data:
            raise PlanError(
                f"{source}: expected a plan (a JSON object with 'version' and 'cuts'), found {_short(data)}."
            )
        if type(data["version"]) is not int or data["version"] < 1:
            raise PlanError(f"{source}: expected a version number from 1 to {PLAN_VERSION}, found {data['version']!r}.")
        if not isinstance(data.get("drops", []), list):
            raise PlanError(
                f"{source}: the plan is malformed: 'drops' should be a list of module paths, found {_short(data['drops'])}."
            )
        if data["version"] > PLAN_VERSION:
            raise PlanError(
                f"{source}: the plan has version {data['version']}, this attrim reads up to {PLAN_VERSION}. "
                "Update with: pip install -U attrim"
            )
        try:
            drops = tuple(str(d) for d in data.get("drops", ()))
            return cls(
                fingerprint=str(data["fingerprint"]),
                cuts={str(name): _read_cut(str(name), cut, source) for name, cut in data["cuts"].items()},
                drops=drops,
                attributes={
                    str(module): {str(a): AttributeCut(int(v["before"]), int(v["after"])) for a, v in cuts.items()}
                    for module, cuts in data.get("attributes", {}).items()
                },
                groups=dict(data.get("groups", {})),
                provenance=dict(data.get("provenance", {})),
                replacements=_read_replacements(data.get("replacements", {}), drops),
                selects=read_selects(data.get("selects", {}), drops),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{source}: the plan is malformed: {type(error).__name__}: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_atomic(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan file.

        Raises:
            PlanError: the file is missing, is not JSON, is malformed or too new.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan file '{path}': {error}.") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"the plan file '{path}' is corrupt: not JSON at line {error.lineno}, column {error.colno} ({error.msg}). "
                "Make it again with plan.save(...)."
            ) from error
        return cls.from_json(data, f"the plan file '{path}'")

    def then(self, following: PruningPlan) -> PruningPlan:
        """This plan followed by ``following`` (made for the pruned network), as one plan for the original.

        Raises:
            PlanError: ``following`` was made for another network; the first differing tensor is named.
        """
        mine = self.provenance.get("fingerprint_after")
        for name, cut in following.cuts.items():
            if name in self.cuts and self.cuts[name].shape_after != cut.shape_before:
                raise PlanError(
                    f"these plans do not follow each other: the first leaves '{name}' with shape "
                    f"{self.cuts[name].shape_after}, the second was made for {cut.shape_before}. "
                    "Trace the pruned model and allocate again."
                )
        if mine is not None and mine != following.fingerprint:
            raise PlanError(
                f"these plans do not follow each other: the first leaves a model with fingerprint {mine}, the second was "
                f"made for {following.fingerprint}. Trace the pruned model and allocate again."
            )
        cuts = {name: cut for name, cut in self.cuts.items() if not within(name, following.drops)}
        for name, cut in following.cuts.items():
            cuts[name] = _compose(cuts[name], cut) if name in cuts else cut
        earlier = [path for path in self.drops if not within(path, following.drops)]
        attributes = {path: cut for path, cut in self.attributes.items() if not within(path, following.drops)}
        return replace(
            following,
            fingerprint=self.fingerprint,
            cuts=cuts,
            drops=(*earlier, *following.drops),
            replacements={
                **{path: r for path, r in self.replacements.items() if path in earlier},
                **following.replacements,
            },
            selects=_compose_selects(self, following),
            attributes=_compose_attributes(attributes, following.attributes),
            groups=_compose_groups(self.groups, following.groups),
            provenance=_compose_provenance(self, following),
        )

    def shape_after(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the plan leaves a tensor of this name and shape with, where it is not dropped."""
        if name in self.cuts:
            return self.cuts[name].shape_after
        path, _, leaf = name.rpartition(".")
        return (len(self.selects[path].keep),) if leaf == "positions" and path in self.selects else shape

    def summary(self) -> str:
        """A few lines for people: costs before and after, the branches that are dropped, and each group's width."""
        lines = []
        for what in ("macs", "params", "channels"):
            before, after = (self.provenance.get(f"{what}_{when}") for when in ("before", "after"))
            if before and after is not None:
                lines.append(f"{what:<9}{before:>15,} -> {after:>15,}  ({100 * after / before:.1f} % kept)")
        dropped = self.provenance.get("dropped", self.drops)
        lines += [f"dropped  {', '.join(dropped)}"] if dropped else []
        lines += [
            f"  {name}: {g['size']} -> {g['kept']}"
            for name, g in self.groups.items()
            if isinstance(g, Mapping) and g.get("kept") != g.get("size")
        ]
        return "\n".join(lines) if lines else f"{len(self.cuts)} tensors cut"


def _compose_groups(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What the second plan says, counted from the sizes before the first."""
    merged = {**first, **second}
    for name in set(first) & set(second):
        if isinstance(first[name], Mapping) and isinstance(second[name], Mapping) and "size" in first[name]:
            merged[name] = {**second[name], "size": first[name]["size"]}
    return merged


def _compose_provenance(first: PruningPlan, second: PruningPlan) -> dict[str, Any]:
    before = {k: v for k, v in first.provenance.items() if k.endswith("_before")}
    dropped = [name for plan in (first, second) for name in plan.provenance.get("dropped", ())]
    gone = {"dropped": list(dict.fromkeys(dropped))} if dropped else {}
    return {**second.provenance, **before, **gone, "steps": [*_steps(first), *_steps(second)]}


def _steps(plan: PruningPlan) -> list[Any]:
    return list(plan.provenance.get("steps", [dict(plan.provenance)]))


def _compose(first: Cut, second: Cut) -> Cut:
    keep = dict(first.keep)
    for dim, kept in second.keep.items():
        base = keep.get(dim)
        keep[dim] = kept if base is None else tuple(np.asarray(base)[list(kept)].tolist())
    return Cut(first.shape_before, keep)


def _compose_attributes(
    first: Mapping[str, Mapping[str, AttributeCut]], second: Mapping[str, Mapping[str, AttributeCut]]
) -> dict[str, dict[str, AttributeCut]]:
    merged = {module: dict(cuts) for module, cuts in first.items()}
    for module, cuts in second.items():
        mine = merged.setdefault(module, {})
        for name, cut in cuts.items():
            mine[name] = AttributeCut(mine[name].before if name in mine else cut.before, cut.after)
    return merged


def _compose_selects(first: PruningPlan, second: PruningPlan) -> dict[str, Selection]:
    selects = {path: s for path, s in first.selects.items() if not within(path, second.drops)}
    for path, selection in second.selects.items():
        try:
            selects[path] = selects[path].then(selection) if path in selects else selection
        except ValueError as error:
            raise PlanError(f"these plans do not follow each other: inputs of '{path}': {error}.") from error
    return selects


def _read_replacements(data: Any, drops: Collection[str]) -> dict[str, Replacement]:
    stray = [str(path) for path in data if str(path) not in drops]
    if stray:
        raise ValueError(f"'replacements' names '{stray[0]}', which 'drops' does not")
    return {str(path): Replacement.from_json(item) for path, item in data.items()}


def _read_cut(name: str, data: Any, source: str) -> Cut:
    shape = tuple(int(n) for n in data["shape_before"])
    keep: dict[int, tuple[int, ...]] = {}
    for dim_text, kept in data["keep"].items():
        dim = int(dim_text)
        if not 0 <= dim < len(shape):
            raise PlanError(f"{source}: '{name}' has {len(shape)} dimensions, the plan cuts dimension {dim}.")
        indices = np.asarray(kept)
        legal = indices.ndim == 1 and indices.size > 0 and np.issubdtype(indices.dtype, np.integer)
        if not legal or indices[0] < 0 or indices[-1] >= shape[dim] or (np.diff(indices) <= 0).any():
            raise PlanError(
                f"{source}: '{name}' dimension {dim}: expected at least one kept index, ascending, in [0, {shape[dim]}), "
                f"found {_short(kept)}."
            )
        keep[dim] = tuple(indices.tolist())
    return Cut(shape, keep)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` through a temporary file and a rename: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
