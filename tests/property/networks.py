"""Random networks: a hypothesis strategy draws a specification, :meth:`Network.build` makes the module.

A specification is plain data that prints as the call which makes it, so a failing case can be pasted into a test.
Drawing follows the shape of the value, so every specification is a network that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import movements, steps

IMAGE = (2, 3, 8, 8)
MAX_WIDTH = 32


@dataclass(frozen=True)
class Step:
    """One operator with its numbers and inner branches; prints as ``step("conv", cin=3, …)``."""

    kind: str
    numbers: tuple[tuple[str, Any], ...]
    branches: tuple[tuple[Step, ...], ...]

    def __repr__(self) -> str:
        inner = "".join(f", {list(branch)!r}" for branch in self.branches)
        return f"step({self.kind!r}{inner}{''.join(f', {k}={v!r}' for k, v in self.numbers)})"

    def build(self) -> nn.Module:
        """The module."""
        return MODULES[self.kind](*(chain(branch) for branch in self.branches), **dict(self.numbers))

    def walk(self) -> Iterator[Step]:
        """This step and every step inside it."""
        yield self
        for branch in self.branches:
            for inner in branch:
                yield from inner.walk()


def step(kind: str, *branches: list[Step], **numbers: Any) -> Step:
    """A step as data."""
    return Step(kind, tuple(numbers.items()), tuple(tuple(branch) for branch in branches))


def chain(parts: tuple[Step, ...] | list[Step]) -> nn.Module:
    """The modules of several steps, one after the other."""
    return steps.Chain(*(part.build() for part in parts))


@dataclass(frozen=True)
class Network:
    """A whole network: the steps from a (2, 3, 8, 8) image to class scores, and the seed of its weights."""

    parts: tuple[Step, ...]
    seed: int

    def __repr__(self) -> str:
        return f"network({', '.join(map(repr, self.parts))}, seed={self.seed})"

    def kinds(self) -> set[str]:
        """Every kind of step in it."""
        return {inner.kind for part in self.parts for inner in part.walk()}

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in float64, eval mode, all parameters and statistics random; and its input."""
        generator = torch.Generator().manual_seed(self.seed)
        model = chain(self.parts).double().eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if not tensor.is_floating_point():
                    continue
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                spread = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.5 * noise
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else spread)
        return model, torch.randn(IMAGE, generator=generator, dtype=torch.float64)


def network(*parts: Step, seed: int = 0) -> Network:
    """A network as data; the inverse of its ``repr``."""
    return Network(parts, seed)


MODULES: dict[str, Callable[..., nn.Module]] = {
    "conv": steps.Conv,
    "up": steps.Up,
    "bn": nn.BatchNorm2d,
    "gn": lambda channels, groups: nn.GroupNorm(groups, channels),
    "in": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "ln_image": steps.ChannelNorm,
    "ln": nn.LayerNorm,
    "act": lambda name: steps.ACTIVATIONS[name](),
    "prelu": nn.PReLU,
    "relu_": steps.InPlace,
    "scale": steps.Scale,
    "residual": steps.Residual,
    "pad": steps.PadChannels,
    "concat": steps.Concat,
    "chunk": steps.Chunk,
    "split": steps.Split,
    "shuffle": steps.Shuffle,
    "se": steps.Squeeze,
    "spatial_gate": steps.SpatialGate,
    "gate": steps.Gate,
    "twice": steps.Twice,
    "resize": steps.Resize,
    "pixel_shuffle": nn.PixelShuffle,
    "pixel_unshuffle": nn.PixelUnshuffle,
    "tokens": steps.Tokens,
    "linear": nn.Linear,
    "mix_tokens": steps.MixTokens,
    "attention": steps.Attention,
    "head": steps.Head,
    "thirds": movements.Thirds,
    "rotate": movements.Rotate,
    "roll": movements.Roll,
    "pick": movements.Pick,
    "interleave": movements.Interleave,
    "stack": movements.Stack,
    "fold": movements.Fold,
    "broadcast": movements.Broadcast,
    "einsum": movements.Einsum,
    "tied": movements.Tied,
    "looks": movements.Looks,
    "several": movements.Several,
}

STATISTICS = {"gn", "ln_image", "ln"}
"""Kinds with statistics over channels: removing a channel changes them, so such a cut may be inexact."""


UNREAD = {"attention", "looks", "fold", "einsum", "tied"}
"""Kinds that read across channels by something else than a convolution or linear layer."""


def reads_channels_without_weights(net: Network) -> bool:
    """Whether something other than a layer or a norm reads across channels: pooled gates, queries times keys, parameters.

    A layer over positions makes them channels as well, and the head may take their mean. Zeroing the columns of layers
    says nothing there, and the cut may be inexact.
    """
    inner = [s for part in net.parts for s in part.walk()]
    pooled = any(s.kind == "spatial_gate" and dict(s.numbers)["pooled"] for s in inner)
    averaged = not dict(net.parts[-1].numbers).get("flat", True)
    return pooled or bool(net.kinds() & UNREAD) or ("mix_tokens" in net.kinds() and averaged)


@dataclass(frozen=True)
class Shape:
    """The value at a point of the network: channels, and side of the image or length of the sequence."""

    channels: int
    side: int
    tokens: bool = False

    @property
    def dim(self) -> int:
        """Where the channels are."""
        return -1 if self.tokens else 1

    @property
    def positions(self) -> int:
        """Pixels or tokens."""
        return self.side if self.tokens else self.side * self.side
