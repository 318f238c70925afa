"""What a pattern network is, and the decorator that puts one into the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["REGISTRY", "Pattern", "image", "pattern", "randomise", "tokens", "words"]

Build = Callable[[], tuple[nn.Module, Any]]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One small network and what a sound tool does with it.

    Attributes:
        name: unique, short.
        build: makes the network (float64, eval mode, fixed seed) and its example inputs.
        expect: ``cut`` if channels of the layer under test can go, ``refused`` if they must stay, with a reason.
        must_cut: globs over axes (``conv2.weight:0``); each must match an axis that really shrinks.
        must_refuse: globs over axes; each must match, and all that match must stay whole, pinned with a reason.
        inexact: parts of the causes for which "not exact" is allowed; empty means that the cut must be exact.
        independent_oracle: whether the oracle applies even when the cut is reported as inexact (it knows the
            statistics of layer and group norms). An exact cut is always held against the oracle.
        consumers: globs over axes of tensors used directly, along which removed positions are zeroed by the oracle.
        producers: the same where no consumer can be zeroed (two factors of one product, a recurrent state): removed
            positions of the producing rows are zeroed instead.
        note: what is special, or why it cannot be cut.
    """

    name: str
    build: Build
    expect: str
    must_cut: tuple[str, ...] = ()
    must_refuse: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()
    independent_oracle: bool = True
    consumers: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    note: str = ""


REGISTRY: dict[str, Pattern] = {}


def pattern(
    name: str,
    *must_cut: str,
    inputs: Callable[[torch.Generator], Any] | None = None,
    expect: str = "cut",
    **fields: Any,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module class as a pattern; images of shape (2, 3, 8, 8) go in unless ``inputs`` says otherwise."""
    make_inputs = inputs or image(2, 3, 8, 8)

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        def build() -> tuple[nn.Module, Any]:
            generator = torch.Generator().manual_seed(7)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = cls().double().eval()
            randomise(model, generator)
            return model, make_inputs(generator)

        if name in REGISTRY:
            raise ValueError(f"two patterns are named {name}")
        REGISTRY[name] = Pattern(name, build, expect, must_cut, **fields)
        return cls

    return register


def image(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Standard normal float64 inputs."""
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def tokens(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Token features (batch, tokens, width)."""
    return image(*shape)


def words(vocabulary: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    """Word numbers below ``vocabulary``."""
    return lambda generator: torch.randint(vocabulary, shape, generator=generator)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every tensor that initialisation leaves constant (statistics, affine, layer scale …) distinct values."""
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point():
                continue
            if name == "running_var":
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
            elif tensor.numel() > 0 and (tensor == tensor.flatten()[0]).all():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
