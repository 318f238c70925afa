"""Trace a model: one labelled run, then probes on cut copies until the run of a pruned network is coherent."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from attrim.core.axes import Axis
from attrim.core.channels import ChannelMap, Reason
from attrim.core.cost import IntArray
from attrim.errors import TraceError
from attrim.trace.groups import build_map
from attrim.trace.inputs import check_model, example_of
from attrim.trace.labels import LabelSpace, Recorder
from attrim.trace.partition import Partition, partition
from attrim.trace.run import Engine, Run
from attrim.trace.solve import Solution, solve
from attrim.trace.tracer import SiteKey, Tracer

__all__ = ["Analysis", "analyse", "label_tensors"]

Pins = list[tuple[IntArray, Reason]]


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """A recorded run and what follows from it; the inside of a :class:`ChannelMap`."""

    engine: Engine
    space: LabelSpace
    labels: Mapping[str, Sequence[IntArray | None]]
    tracer: Tracer
    book: Recorder
    solution: Solution
    parts: Partition
    outputs: list[Tensor]
    extra: Pins

    def attributes_at(self, alive: npt.NDArray[np.bool_]) -> list[tuple[str, str, int]]:
        """(module, attribute, value) of the numbers that follow a cut; ``alive``: label -> stays."""
        rules: dict[tuple[str, str], int] = {}
        for note in self.book.rules:
            count = int(alive[note.vector].sum())
            if count != len(note.vector):
                rules.setdefault((note.module, note.attribute), count)
        return [(module, name, value) for (module, name), value in rules.items()]

    def channel_map(self) -> ChannelMap:
        """The public nouns."""
        return build_map(self)


def label_tensors(engine: Engine) -> tuple[LabelSpace, dict[str, list[IntArray | None]]]:
    """Give every position of every axis longer than 1 a label of its own."""
    space = LabelSpace()
    labels = {
        name: [space.add(Axis(name, d), n) if n > 1 else None for d, n in enumerate(tensor.shape)]
        for name, tensor in engine.named.tensors.items()
    }
    return space, labels


def analyse(
    model: nn.Module, example_inputs: Any, *, check: bool = False, decisions: Mapping[SiteKey, int] | None = None
) -> Analysis:
    """Record a labelled run and settle every size-bearing site by probing cut copies.

    With ``check`` every group is also cut and compared in numbers; one that fails is pinned with the reason. ``decisions``
    are those of an earlier run of much the same code, to read its sites in the same way.
    """
    from attrim.trace.check import check_numbers
    from attrim.trace.probe import settle

    check_model(model)
    engine = Engine(model, example_of(example_inputs))
    space, labels = label_tensors(engine)
    with _no_collection():
        analysis = settle(engine, space, labels, decisions)
    return check_numbers(analysis) if check else analysis


@contextmanager
def _no_collection() -> Iterator[None]:
    """Thousands of small objects per run make the garbage collector walk the whole heap again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def record(
    engine: Engine,
    space: LabelSpace,
    labels: Mapping[str, Sequence[IntArray | None]],
    decisions: Mapping[SiteKey, int],
    extra: Pins,
) -> Analysis:
    """One recorded run, solved and partitioned."""
    book = Recorder()
    run = engine.run(book, labels, decisions)
    if run.failure is not None and not engine.real:
        engine.real = True  # fake tensors hold no data; control flow that depends on data needs the real run
        book = Recorder()
        run = engine.run(book, labels, decisions)
    if run.failure is not None:
        raise TraceError(
            f"the model ({type(engine.model).__name__}) does not run on the example inputs: {run.failure.reason}. "
            f"The inputs were {_describe(engine)}. Check that model.eval()(*inputs) runs, and pass inputs of that shape."
        ) from run.failure.error
    return conclude(engine, space, labels, run, book, extra)


def conclude(
    engine: Engine,
    space: LabelSpace,
    labels: Mapping[str, Sequence[IntArray | None]],
    run: Run,
    book: Recorder,
    extra: Pins,
) -> Analysis:
    """Pin outputs and unused tensors, solve, partition."""
    tracer = run.tracer
    pins = [*_outputs(run), *_unused(tracer, engine, labels), *extra]
    solution = solve(book, space.total, pins)
    parts = partition(space, solution, book)
    return Analysis(engine, space, labels, tracer, book, solution, parts, run.outputs, list(extra))


def _outputs(run: Run) -> Pins:
    reason = Reason("is an output of the network")
    return [(v, reason) for out in run.outputs for v in run.tracer.value(out).axes if v is not None]


def _unused(tracer: Tracer, engine: Engine, labels: Mapping[str, Sequence[IntArray | None]]) -> Pins:
    """Tensors that no operator met: nothing is known of them, so they stay."""
    met = {id(v) for _, _, known in tracer.steps for value in known for v in value.axes if v is not None}
    reason = Reason("not used in the run on these example inputs")
    return [
        (vector, reason)
        for name in engine.named.tensors
        if not any(id(v) in met for v in labels[name] if v is not None)
        for vector in labels[name]
        if vector is not None
    ]


def _describe(engine: Engine) -> str:
    from attrim.trace.inputs import outputs_of

    tensors = outputs_of((engine.example.args, engine.example.kwargs), required=False)
    return ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors)
