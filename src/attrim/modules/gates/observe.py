"""One watched run: what follows each producing layer, which weights read it, and which groups are sums of branches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from attrim.modules.names import named_tensors

__all__ = ["Observation", "Reading", "observe"]

Key: TypeAlias = tuple[str, int]
"""A producing layer, and the number of modules that its output has gone through since."""

_SAME_SCALE = frozenset(
    [
        "relu",
        "relu_",
        "leaky_relu",
        "leaky_relu_",
        "_prelu_kernel",
        "view",
        "_unsafe_view",
        "reshape",
        "alias",
        "detach",
        "clone",
        "contiguous",
        "_to_copy",
        "permute",
        "transpose",
        "t",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "unsqueeze",
        "squeeze",
        "expand",
        "cat",
        "stack",
        "flip",
        "roll",
        "max_pool2d_with_indices",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "max_pool3d_with_indices",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "mean",
        "sum",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_max_pool2d",
        "dropout",
        "native_dropout",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "pixel_shuffle",
        "native_channel_shuffle",
        "as_strided",
        "neg",
    ]
)
"""Operators f with f(a x) = a f(x) for a >= 0, each argument taken alone (``cat``), other arguments being numbers."""

_PLACE_OF_DATA = {"convolution": 0, "_convolution": 0, "mm": 0, "addmm": 1, "linear": 0, "matmul": 0}


def _keeps_scale(name: str, args: Any) -> bool:
    if name == "constant_pad_nd":
        return len(args) < 3 or not args[2]
    if name == "mean":  # over places; a mean over channels mixes them
        return len(args) > 1 and args[0].ndim > 3 and all(d % args[0].ndim >= 2 for d in args[1])
    return name in _SAME_SCALE


@dataclass(slots=True)
class Reading:
    """Who reads a layer's output.

    Attributes:
        weights: names of the weights that multiply it, with nothing but its own scale in between.
        blocked: the first operator through which a scale does not pass unchanged, or "".
        rectified: whether a ReLU, and nothing else, comes next.
    """

    weights: set[str] = field(default_factory=set)
    blocked: str = ""
    next: set[str] = field(default_factory=set)

    @property
    def rectified(self) -> bool:
        """Whether everything that reads the output directly is a ReLU."""
        return bool(self.next) and self.next <= {"relu", "relu_"}


@dataclass(slots=True)
class Observation:
    """What one forward pass showed.

    Attributes:
        chains: producing layer -> the modules that its output goes through, one after the other and nowhere else.
        readings: who reads the output of a layer, or of a module of its chain.
        sums: pairs of producing layers whose outputs were added.
    """

    chains: Mapping[str, tuple[str, ...]]
    readings: Mapping[Key, Reading]
    sums: frozenset[frozenset[str]]


def observe(model: nn.Module, sources: Mapping[str, Collection[str]], run: Callable[[], object]) -> Observation:
    """Watch one call of ``run``, a forward pass of ``model`` in eval mode and without gradients.

    Args:
        model: the network.
        sources: path of a producing layer -> paths of the modules that may follow it (its norm, its activation).
        run: runs the model once.
    """
    watch = _Watch(model, sources)
    with watch.hooked(), torch.no_grad(), watch:
        run()
    return watch.result()


@dataclass(slots=True, eq=False)
class _Flow:
    """The output of one call of a producing layer, on its way."""

    source: str
    tensor: Tensor
    steps: list[str] = field(default_factory=list)
    checks: list[tuple[Tensor, int, int]] = field(default_factory=list)
    before: int = 0


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, sources: Mapping[str, Collection[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.sources = model, sources
        self.flows: list[_Flow] = []
        self.uses: Any = WeakIdKeyDictionary()
        self.direct: Any = WeakIdKeyDictionary()  # tensor -> keys whose very output it is
        self.scaled: Any = WeakIdKeyDictionary()  # tensor -> keys whose scale it carries
        self.touched: Any = WeakIdKeyDictionary()  # tensor -> producing layers that it is made from
        self.parameters: Any = WeakIdKeyDictionary()  # a parameter or a view of one -> its name
        self.readings: dict[Key, Reading] = {}
        self.sums: set[frozenset[str]] = set()
        for name, tensor in named_tensors(model).tensors.items():
            self.parameters[tensor] = name

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the layers and on what may follow them, gone afterwards."""
        handles = []
        followers = {path for paths in self.sources.values() for path in paths}
        try:
            for path, module in self.model.named_modules():
                if path in followers:
                    handles.append(module.register_forward_pre_hook(self._enter))
                if path in followers or path in self.sources:
                    handles.append(module.register_forward_hook(self._leaver(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        for flow in self.flows:
            if args and args[0] is flow.tensor:
                flow.before = self.uses[flow.tensor]

    def _leaver(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if not isinstance(out, Tensor):
                return
            if path in self.sources:
                self.flows.append(_Flow(path, out))
                self._mark(out, (path, 0))
                return
            for flow in self.flows:
                if args and args[0] is flow.tensor and path in self.sources[flow.source]:
                    self._step(flow, path, out)

        return leave

    def _step(self, flow: _Flow, path: str, out: Tensor) -> None:
        inside = self.uses[flow.tensor] - flow.before
        if flow.before:
            flow.checks.append((flow.tensor, -1, len(flow.steps)))
        elif out is not flow.tensor:
            flow.checks.append((flow.tensor, inside, len(flow.steps)))
        flow.steps.append(path)
        flow.tensor = out
        self._mark(out, (flow.source, len(flow.steps)))

    def _mark(self, tensor: Tensor, key: Key) -> None:
        self.readings.setdefault(key, Reading())
        self.uses[tensor] = 0
        self.direct[tensor] = {key}
        self.scaled[tensor] = self.scaled.get(tensor, frozenset()) | {key}
        self.touched[tensor] = self.touched.get(tensor, frozenset()) | {key[0]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what went into it."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        for tensor in {id(t): t for t in tensors}.values():
            if tensor in self.uses:
                self.uses[tensor] += 1
            for key in self.direct.get(tensor, ()):
                self.readings[key].next.add(name)
        out = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._names(name, tensors, outputs)
        if any(t in self.touched for t in tensors):
            self._flow(name, args, tensors, outputs)
        return out

    def _names(self, name: str, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        if (
            len(tensors) == 1
            and tensors[0] in self.parameters
            and name in ("t", "transpose", "permute", "detach", "view")
        ):
            for out in outputs:
                self.parameters[out] = self.parameters[tensors[0]]

    def _flow(self, name: str, args: Any, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        scaled = frozenset[Key]().union(*(self.scaled.get(t, frozenset()) for t in tensors))
        touched = frozenset[str]().union(*(self.touched.get(t, frozenset()) for t in tensors))
        if name in ("add", "add_") and len(tensors) == 2:
            one, two = (self.touched.get(t, frozenset()) for t in tensors)
            self.sums |= {frozenset((a, b)) for a in one - two for b in two - one}
        passed = scaled if _keeps_scale(name, args) else frozenset[Key]()
        if name in _PLACE_OF_DATA:
            touched = self._contract(name, args, scaled, touched)
        else:
            self._block(scaled - passed, name)
        for out in outputs:
            self.scaled[out], self.touched[out] = passed, touched

    def _contract(self, name: str, args: Any, scaled: frozenset[Key], touched: frozenset[str]) -> frozenset[str]:
        place = _PLACE_OF_DATA[name]
        data, weight = args[place], args[place + 1]
        read = self.scaled.get(data, frozenset())
        stored = self.parameters.get(weight)
        if stored is None:
            self._block(scaled, name)
            return touched
        for key in read:
            self.readings[key].weights.add(stored)
        self._block(scaled - read, name)
        grouped = name in ("convolution", "_convolution") and args[8] > 1
        return touched if grouped else frozenset()

    def _block(self, keys: frozenset[Key], name: str) -> None:
        for key in keys:
            self.readings[key].blocked = self.readings[key].blocked or name

    def result(self) -> Observation:
        """What was seen."""
        chains: dict[str, tuple[str, ...]] = {}
        for flow in self.flows:
            steps = flow.steps
            for tensor, inside, length in flow.checks:
                if self.uses[tensor] != inside:
                    steps = steps[: min(length, len(steps))]
            own = tuple(steps)
            known = chains.get(flow.source, own)
            common = next(
                (i for i, (a, b) in enumerate(zip(own, known, strict=False)) if a != b), min(len(own), len(known))
            )
            chains[flow.source] = own[:common]
        return Observation(chains, self.readings, frozenset(self.sums))
