"""Attention transfer: where the teacher and the student are compared, and the hooks that watch both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelGroup, ChannelMap, Tap
from attrim.errors import AttrimWarning, InputError
from attrim.recover.losses import attention_transfer

__all__ = ["AttentionTransfer", "Place", "choose_places"]


@dataclass(frozen=True, slots=True)
class Place:
    """A module whose output is compared.

    Attributes:
        group: the channel group that it shows.
        module: path of the module, in the student and the teacher alike.
        dim: dimension of its output that holds the channels.
    """

    group: str
    module: str
    dim: int


def choose_places(
    channels: ChannelMap, teacher: nn.Module, run: Callable[[nn.Module], object], student: nn.Module | None = None
) -> tuple[Place, ...]:
    """One place for each residual stream: its end, where it has axes of positions.

    A residual stream is a group that several layers write to; a network without one is compared at all of its groups.
    Of the group's taps the last one with positions counts, one whose module runs once before one that runs several times
    (a shared ReLU, which is compared call by call). For a stream, the outermost module around that tap with an output
    of the same shape takes its place: the block or stage, whose output is the sum after its activation, as in the
    paper. Groups without positions (linear layers, pooled features) are left out, and one :class:`AttrimWarning` says
    which and why.

    Where the student lacks residual branches, a place inside one of them shows nothing, and the last one before it counts.
    A block that has become the identity still shows its stream.

    Args:
        channels: the map of the teacher.
        teacher: the dense network, in eval mode.
        run: gives a model one batch, as ``run(model)``.
        student: the pruned network, in eval mode; None for one that lacks no branch.

    Raises:
        InputError: no group has such a place, or a tap's module does not exist in the model.
    """
    modules = dict(teacher.named_modules())
    streams = [group for group in channels if _writers(group, modules) > 1]
    groups = streams or list(channels)
    seen = _outputs(teacher, {tap.module for group in groups for tap in group.taps}, run)
    chosen: dict[str, list[Place]] = {}
    for group in groups:
        fitting = [tap for tap in group.taps if _positions(seen.get(tap.module, []), tap)]
        single = [tap for tap in fitting if len(seen[tap.module]) == 1]
        paths = [_around(tap.module, seen) if streams else tap.module for tap in single or fitting]
        chosen[group.id] = [Place(group.id, path, tap.dim) for path, tap in zip(paths, single or fitting, strict=True)]
    gone = (
        set() if student is None else _gone(student, {p.module for found in chosen.values() for p in found}, seen, run)
    )
    places: list[Place] = []
    skipped: list[str] = []
    for group in groups:
        left = [place for place in chosen[group.id] if place.module not in gone]
        places += left[-1:]
        if not left:
            why = "its branch was dropped" if chosen[group.id] else _reason(group, seen)
            skipped.append(f"'{group.id}' ({why})")
    unique = {(place.module, place.dim): place for place in places}
    if skipped:
        warnings.warn(
            f"attention transfer leaves out {len(skipped)} of {len(groups)} groups: {', '.join(skipped[:5])}"
            f"{', …' if len(skipped) > 5 else ''}.",
            AttrimWarning,
            stacklevel=2,
        )
    if not unique:
        raise InputError(
            "attention transfer found no activations with positions in the channel map: it compares where in an image "
            "two networks look. Pass attention=0."
        )
    return tuple(unique.values())


class AttentionTransfer:
    """Watches a student and a teacher at the same places and compares what they attend to.

    Args:
        places: where.

    Example:
        >>> transfer = AttentionTransfer(places)
        >>> with transfer.watching(student, teacher):
        ...     student(x), teacher(x)
        ...     loss = transfer.loss()
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._student: dict[str, list[Tensor]] = {}
        self._teacher: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self, student: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """Collect outputs inside the block; the hooks are gone afterwards."""
        paths = {place.module for place in self.places}
        with ExitStack() as stack:
            stack.enter_context(_collecting(student, paths, self._student))
            stack.enter_context(_collecting(teacher, paths, self._teacher))
            yield

    def loss(self) -> Tensor:
        """``Σ_l ‖A_S/‖A_S‖ - A_T/‖A_T‖‖²`` over the places (mean over the calls of each), and forget the outputs.

        Raises:
            InputError: a module ran in one of the networks and not, or another number of times, in the other.
        """
        total: Tensor | None = None
        for place in self.places:
            ours, theirs = self._student.get(place.module, []), self._teacher.get(place.module, [])
            if len(ours) != len(theirs) or not ours:
                raise InputError(
                    f"attention transfer at '{place.module}': it ran {len(ours)} times in the student and "
                    f"{len(theirs)} times in the teacher. Expected the same network, pruned and not."
                )
            pairs = [attention_transfer(a, b, place.dim) for a, b in zip(ours, theirs, strict=True)]
            part = torch.stack(pairs).mean()
            total = part if total is None else total + part
        self.forget()
        if total is None:
            raise InputError("attention transfer has no place to compare.")
        return total

    def forget(self) -> None:
        """Let go of the collected outputs."""
        self._student.clear()
        self._teacher.clear()


@contextmanager
def _collecting(model: nn.Module, paths: set[str], into: dict[str, list[Tensor]]) -> Iterator[None]:
    modules = dict(model.named_modules())
    missing = sorted(path for path in paths if path not in modules)
    if missing:
        raise InputError(
            f"the channel map belongs to another model: there is no module '{missing[0]}'. Trace the dense network: "
            "channels = attrim.trace(dense_model, example_inputs)."
        )

    def listener(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                into.setdefault(path, []).append(output)

        return listen

    handles = [modules[path].register_forward_hook(listener(path)) for path in sorted(paths)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        into.clear()


def _outputs(model: nn.Module, paths: set[str], run: Callable[[nn.Module], object]) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each module, and those around it, put out in one run, call by call."""
    into: dict[str, list[Tensor]] = {}
    around = {path.rsplit(".", n)[0] for path in paths for n in range(path.count(".") + 1)}
    with torch.no_grad(), _collecting(model, paths | around, into):
        run(model)
        return {path: [tuple(tensor.shape) for tensor in tensors] for path, tensors in into.items()}


def _gone(
    student: nn.Module,
    paths: set[str],
    seen: Mapping[str, list[tuple[int, ...]]],
    run: Callable[[nn.Module], object],
) -> set[str]:
    """Places at which the student shows nothing: no module, another number of outputs, or nothing but zeros.

    None of them if there is no other: then the two networks have nothing in common, which is for the comparison to say.
    """
    there = {path for path, _ in student.named_modules()} & paths
    into: dict[str, list[Tensor]] = {}
    with torch.no_grad(), _collecting(student, there, into):
        run(student)
        alive = {
            path
            for path, outputs in into.items()
            if len(outputs) == len(seen[path]) and all(bool(tensor.any()) for tensor in outputs)
        }
    return paths - alive if alive else set()


def _around(path: str, seen: Mapping[str, list[tuple[int, ...]]]) -> str:
    """The outermost module around ``path`` that puts out a tensor of the same shape, as often."""
    parts = path.split(".")
    outer = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((name for name in outer if seen.get(name) == seen[path]), path)


def _writers(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> int:
    """Layers that produce the group's channels; a grouped (depthwise) one passes them on and does not count."""
    tensors = [
        member.axis.tensor for member in group.members if member.role == "out" and "weight" in member.axis.tensor
    ]
    return sum(1 for name in tensors if getattr(modules.get(name.rpartition(".")[0]), "groups", 1) == 1)


def _positions(shapes: Sequence[tuple[int, ...]], tap: Tap) -> bool:
    """Whether every call has the channels along ``tap.dim`` and more than one position beside them."""
    return bool(shapes) and all(len(s) > tap.dim and _count(s, tap.dim) > 1 for s in shapes)


def _count(shape: tuple[int, ...], dim: int) -> int:
    count = 1
    for d, n in enumerate(shape):
        if d not in (0, dim):
            count *= n
    return count


def _reason(group: ChannelGroup, seen: Mapping[str, list[tuple[int, ...]]]) -> str:
    if not group.taps:
        return "no module shows its channels"
    last = group.taps[-1]
    shapes = seen.get(last.module, [])
    if not shapes:
        return f"'{last.module}' puts out no tensor"
    return f"'{last.module}' puts out {tuple(shapes[-1])}, which has no positions"
