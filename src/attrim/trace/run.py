"""One labelled run: a copy of the model with labelled tensors, under a dispatch mode that applies the operator rules."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as module_hooks
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from attrim.core.channels import Reason
from attrim.core.cost import IntArray
from attrim.modules.names import NamedTensors, named_tensors
from attrim.modules.repair import repair_attributes, write_attribute
from attrim.modules.skeleton import copy_with
from attrim.trace.call import Call, tensors_in
from attrim.trace.graph import Graph
from attrim.trace.inputs import Example, map_tensors, outputs_of
from attrim.trace.labels import Checker, Recorder, Value
from attrim.trace.rules import RULES, Rule
from attrim.trace.rules.pointwise import pointwise, silent
from attrim.trace.shortcuts import fake_like, shortcut
from attrim.trace.tracer import Attribute, SiteKey, Tracer
from attrim.trace.where import call_site

__all__ = ["Engine", "Failure", "LabelMode", "Run", "Watch", "labelled_call"]

Mask = Callable[[Call, Tracer], tuple[Sequence[Any], Mapping[str, Any]]]
"""Called before an operator; returns the arguments to run it with."""

Watch = Callable[[Tracer], None]
"""Called after an operator; may raise to end the run."""


@dataclass(slots=True)
class Failure:
    """A run that raised: the error and the place."""

    error: Exception
    op: int
    reason: Reason


@dataclass(slots=True)
class Run:
    """A finished or failed labelled run."""

    tracer: Tracer
    outputs: list[Tensor] = field(default_factory=list)
    failure: Failure | None = None


class LabelMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator as usual, then lets its rule carry the labels across."""

    def __init__(
        self, tracer: Tracer, mask: Mask | None = None, watch: Watch | None = None, fake: FakeTensorMode | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.mask = mask
        self.watch = watch
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        t = self.tracer
        name, rule = _rule_of(func)
        call = Call(func, name, args, kwargs or {})
        counted = name not in _COPIES
        t.op += counted
        t.operator = str(func).removesuffix(".default")
        t.lines = call_site()
        if isinstance(t.book, Checker):
            t.book.op = t.op
        known = [t.value(x) for x in call.inputs]
        if t.graph is not None:
            t.graph.before(call)
        t.in_step = counted and _in_step(t, name)
        t.path = t.stack[-1][0] if t.stack else ""  # an exception unwinds the stack before anybody asks
        if self.mask is not None:
            args, kwargs = self.mask(call, t)
        t.running = True
        quick = shortcut(self.fake, call, func._schema.name.endswith("_")) if self.fake is not None else None
        call.out = func(*args, **(kwargs or {})) if quick is None else quick
        t.running = False
        if rule is not None:
            rule(t, call)
        else:
            _unknown(t, call, known)
        if not counted:
            if t.graph is not None:
                t.graph.copied(call)
            return call.out
        t.steps.append((name, [(tuple(o.shape), t.value(o)) for o in call.outputs], known))
        t.numbers.append(_numbers(args) if rule is pointwise else ())
        t.places.append((t.operator, t.path, str(t.lines)))
        if t.graph is not None:
            t.graph.after(call, t.path, str(t.lines))
        if self.watch is not None:
            self.watch(t)
        return call.out


def _in_step(t: Tracer, name: str) -> bool:
    """Whether a run on a cut network is at the operator that the recorded run had under this number.

    Other runs (real numbers, other kernels) may count differently and decide for themselves: they have the whole sizes.
    """
    if t.guide is None or not isinstance(t.book, Checker):
        return False
    return t.op < len(t.guide.steps) and t.guide.steps[t.op][0] == name


def _numbers(args: Sequence[Any]) -> tuple[float, ...]:
    """The plain numbers among the arguments of a pointwise operator."""
    return tuple(float(a) for a in args if type(a) in (int, float))


def _unknown(t: Tracer, call: Call, known: Sequence[Value]) -> None:
    t.pin_all(known, f"no rule for operator {call.func}")
    for out in call.outputs:
        t.set(out, (None,) * out.ndim, any(v.live for v in known))


_COPIES = ("clone", "alias", "detach", "contiguous", "device")
"""Whether a reshape copies depends on strides, and so on widths: copies are not counted as operators of a run."""

_VIEWS = {"_unsafe_view": "view", "_reshape_alias": "view"}

_CACHE: dict[Any, tuple[str, Rule | None]] = {}


def _rule_of(func: Any) -> tuple[str, Rule | None]:
    found = _CACHE.get(func)
    if found is None:
        namespace, _, name = func._schema.name.partition("::")
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        rule = RULES.get(base) if namespace == "aten" else silent if namespace == "prim" else None
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        found = _CACHE[func] = (_VIEWS.get(base, base), rule)
    return found


@contextmanager
def _module_stack(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Keep ``tracer.stack`` equal to the modules being run, and note each module's output as a tap."""
    paths = {id(m): path for path, m in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        parent = tracer.stack[-1][0] if tracer.stack else ""
        tracer.stack.append((paths.get(id(module), parent), module))
        tracer.inputs.append([tracer.value(x) for x in tensors_in(args)])
        if tracer.graph is not None:
            tracer.graph.enter(paths.get(id(module)), module, args)

    def leave(module: nn.Module, args: Any, *rest: Any) -> None:
        out = rest[-1]  # a call that raised comes without its keyword arguments
        path, _ = tracer.stack.pop()
        tracer.inputs.pop()
        if tracer.graph is not None:
            tracer.graph.leave(rest[0] if len(rest) > 1 else {}, out)
        if isinstance(out, Tensor) and not any(True for _ in module.children()):
            tracer.taps.append((path, module, tracer.value(out)))
            if isinstance(module, _InstanceNorm) and out.ndim > 1:  # states its width even where it has no tensor
                tracer.follow(Attribute(path, "num_features", out.shape[1]), tracer.value(out).axes[1])
            if tracer.sums is not None:
                tracer.sums.append(_sums(tracer, out))

    handles = (
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, with_kwargs=True, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sums(tracer: Tracer, out: Tensor) -> Tensor:
    """Absolute values of a module's output averaged over all but its channel axes: enough to see where two runs part."""
    axes = tracer.value(out).axes
    if tracer.guide is not None and len(tracer.taps) <= len(tracer.guide.taps):
        axes = tracer.guide.taps[len(tracer.taps) - 1][2].axes
    if not out.is_floating_point() or len(axes) != out.ndim:
        return torch.zeros(0)
    rest = [d for d, v in enumerate(axes) if v is None]
    return out.detach().abs().mean(dim=rest) if rest else out.detach().clone()


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Switch off fused inference kernels that would hide structure (attention fast path, one-piece LSTM)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack:
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            with warnings.catch_warnings():  # restoring its tf32 flag warns on machines without that hardware
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stack.close()


@contextmanager
def _quiet_failures() -> Iterator[None]:
    """Fake tensors log every operator that refuses its sizes; here a refusal is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def labelled_call(
    model: nn.Module,
    example: Example,
    tracer: Tracer,
    fake: FakeTensorMode | None,
    mask: Mask | None = None,
    watch: Watch | None = None,
) -> Run:
    """Run ``model`` (attrim's own copy) with labels; an error inside is returned, not raised."""
    run = Run(tracer)
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_plain_kernels(model))
        stack.enter_context(_module_stack(model, tracer))
        if fake is not None:
            stack.enter_context(fake)
            stack.enter_context(_quiet_failures())
        try:
            with LabelMode(tracer, mask, watch, fake):
                result = model(*example.args, **example.kwargs)
        except Exception as error:
            # raised between operators (a reshape that refuses, a check in the code): it is the next one that fails
            run.failure = Failure(error, tracer.op + (not tracer.running), _reason(tracer, error))
            return run
    run.outputs = outputs_of(result)
    return run


def _reason(tracer: Tracer, error: Exception) -> Reason:
    return Reason(_first_line(error), tracer.operator, tracer.path, str(tracer.lines) if tracer.lines else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class Engine:
    """Makes labelled runs of one model, whole or cut, on fake tensors (or real ones where fake ones cannot go on).

    Attributes:
        real: run on real tensors.
        dtype: floating-point tensors are converted to it in a real run; None leaves them.
        sums: collect averages of the leaf modules' outputs.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model = model
        self.named: NamedTensors = named_tensors(model)
        self.example = example
        self.real = False
        self.dtype: torch.dtype | None = None
        self.sums = False

    def run(
        self,
        book: Recorder | Checker,
        labels: Mapping[str, Sequence[IntArray | None]],
        decisions: Mapping[SiteKey, int],
        keep: Mapping[str, Mapping[int, IntArray]] | None = None,
        attributes: Sequence[tuple[str, str, int]] = (),
        mask: Mask | None = None,
        guide: Tracer | None = None,
        watch: Watch | None = None,
    ) -> Run:
        """A run in which every tensor carries ``labels`` (one vector per axis), after cutting to ``keep``."""
        tracer = Tracer(book, dict(decisions), guide=guide, sums=[] if self.sums else None)
        if isinstance(book, Recorder) and not self.sums:
            tracer.graph = Graph()
        fake = None if self.real else FakeTensorMode(allow_non_fake_inputs=True)
        keep = keep or {}
        tensors = {}
        for name, tensor in self.named.tensors.items():
            copied = self._tensor(tensor, keep.get(name, {}), fake)
            copied._attrim_value = Value(tuple(labels[name]), live=False)  # type: ignore[attr-defined]
            if name in self.named.parameters:
                copied._is_param = True
            if tracer.graph is not None:
                tracer.graph.name(copied, name, tuple(labels[name]))
            tensors[name] = copied
        model = copy_with(self.model, self.named, tensors)
        if keep:
            indices = {n: {d: tuple(i.tolist()) for d, i in dims.items()} for n, dims in keep.items()}
            repair_attributes(model, indices, self.named.aliases)
        for path, attribute, value in attributes:
            write_attribute(model.get_submodule(path), attribute, value)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype or before)
        try:
            return labelled_call(model, self._inputs(fake), tracer, fake, mask, watch)
        finally:
            torch.set_default_dtype(before)

    def _tensor(self, tensor: Tensor, keep: Mapping[int, IntArray], fake: FakeTensorMode | None) -> Tensor:
        if fake is None:
            copied = tensor.detach()
            for dim, indices in keep.items():
                copied = copied.index_select(dim, torch.from_numpy(indices).to(tensor.device))
            copied = copied if keep else copied.clone()
            return copied.to(self.dtype) if self.dtype and copied.is_floating_point() else copied
        if not keep:
            return fake_like(fake, tensor.shape, tensor.dtype, tensor.stride())
        shape = [len(keep[d]) if d in keep else n for d, n in enumerate(tensor.shape)]
        return fake_like(fake, shape, tensor.dtype)

    def _inputs(self, fake: FakeTensorMode | None) -> Example:
        def convert(x: Tensor) -> Tensor:
            if fake is None:
                new = x.detach().clone()
                new = new.to(self.dtype) if self.dtype and new.is_floating_point() else new
            else:
                new = fake_like(fake, x.shape, x.dtype, x.stride())
            new._attrim_value = Value((None,) * x.ndim, live=True)  # type: ignore[attr-defined]
            return new

        return Example(map_tensors(self.example.args, convert), map_tensors(self.example.kwargs, convert))
