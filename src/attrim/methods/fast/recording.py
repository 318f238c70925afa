"""One run of a network, written down: which modules were called, which operators ran, and what read what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attrim.modules.batches import Batch, run_batch

__all__ = ["Call", "Op", "Recording", "record"]

Key = tuple[str, int]
"""A call: the module's path, and which of its calls it is."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        key: path and number.
        parent: position of the enclosing call in :attr:`Recording.calls`, -1 for the root.
        begin, end: the operators ``begin … end - 1`` ran inside.
        gives: storages of the tensors in its output.
        outputs, takes: identities of the tensors in its output and among its positional inputs.
        nbytes: of its output.
    """

    key: Key
    parent: int
    begin: int
    end: int = -1
    gives: frozenset[int] = frozenset()
    outputs: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Op:
    """One operator call: storages that it reads, gives and changes, and roughly what it costs.

    ``escapes`` if it gives a number to the code that called it, which may go another way for another one.
    """

    reads: frozenset[int]
    gives: frozenset[int]
    changes: frozenset[int]
    work: int
    escapes: bool


@dataclass(slots=True, eq=False)
class Recording:
    """A run in order."""

    calls: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def work(self) -> list[int]:
        """Cumulative work before each operator; one more entry than operators."""
        total, found = 0, [0]
        for op in self.ops:
            total += op.work
            found.append(total)
        return found

    def widest(self) -> int:
        """Bytes of the largest output of a call."""
        return max((call.nbytes for call in self.calls), default=0)

    def first_use(self, model: nn.Module) -> dict[str, int]:
        """Tensor name -> the first operator that can see it: where the module that owns it, or the nearest one round it, begins.

        A tensor that several modules own counts where the first of them begins.
        """
        begins: dict[str, int] = {}
        for call in self.calls:
            begins.setdefault(call.key[0], call.begin)
        owners: dict[int, int] = {}
        names: dict[str, int] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            at = path
            while at not in begins:
                at = at.rpartition(".")[0]
            own = [*module._parameters.items(), *module._buffers.items()]
            for leaf, tensor in own:
                if tensor is not None:
                    names[f"{path}.{leaf}" if path else leaf] = id(tensor)
                    owners[id(tensor)] = min(owners.get(id(tensor), begins[at]), begins[at])
        return {name: owners[which] for name, which in names.items()}


@torch.no_grad()
def record(model: nn.Module, batch: Batch) -> Recording:
    """Run ``model`` once, as it is, and write down what happened.

    Args:
        model: not changed.
        batch: what it is run on; a few samples are enough.
    """
    recording = Recording()
    watch = _Watch(recording)
    with ExitStack() as stack:
        stack.enter_context(_calls(model, recording, watch))
        stack.enter_context(watch)
        run_batch(model, batch)
    return recording


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator. All results are held until the end, so that no storage's identity is used twice."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording
        self.held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        self.held.append((inputs, outputs))
        changed = _changed(func, args, kwargs)
        self.recording.ops.append(
            Op(
                frozenset(map(_storage, inputs)),
                frozenset(map(_storage, (*outputs, *changed))),
                frozenset(map(_storage, changed)),
                _work(inputs, outputs),
                not outputs and not changed,
            )
        )
        return out


@contextmanager
def _calls(model: nn.Module, recording: Recording, watch: _Watch) -> Iterator[None]:
    counts: dict[str, int] = {}
    stack: list[int] = []
    handles: list[Any] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            number = counts.get(path, 0)
            counts[path] = number + 1
            call = Call((path, number), stack[-1] if stack else -1, len(recording.ops))
            call.takes = tuple(id(t) for t in _tensors(args))
            watch.held.append(args)
            stack.append(len(recording.calls))
            recording.calls.append(call)

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        call = recording.calls[stack.pop()]
        found = _tensors(out)
        call.end, call.gives = len(recording.ops), frozenset(map(_storage, found))
        call.outputs, call.nbytes = tuple(map(id, found)), sum(t.nbytes for t in found)
        watch.held.append(out)

    try:
        for path, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _changed(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _work(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Multiply-adds of a convolution or matrix product, elements of anything else."""
    out = max((t.numel() for t in outputs), default=0)
    if len(inputs) < 2 or not outputs or not inputs[0].ndim == inputs[1].ndim == outputs[0].ndim >= 3:
        return out
    filters = inputs[1]
    return out * prod(filters.shape[1:]) if filters.shape[0] == outputs[0].shape[1] else out
