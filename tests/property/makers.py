"""Drawing one operator: from the shape of a value to a step with fitting numbers, and the next shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from hypothesis import strategies as st

from .networks import MAX_WIDTH, Shape, Step, step
from .steps import ACTIVATIONS

T = TypeVar("T")
Draw = st.DrawFn
Drawn = tuple[list[Step], Shape]
Maker = Callable[[Draw, Shape, int], Drawn | None]
"""``(draw, shape, depth)`` -> steps and the next shape, or None when the kind does not fit there."""

WIDTHS = (4, 6, 8, 12)
MAX_SIDE = 16


def pick(draw: Draw, options: Sequence[T]) -> T:
    """One of ``options``; shrinks towards the first."""
    return draw(st.sampled_from(options))


def divisors(*numbers: int) -> list[int]:
    """What divides all of ``numbers``, ascending."""
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


# weights -------------------------------------------------------------------------------------------------------------


def conv(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return convolution(draw, shape, pick(draw, WIDTHS), pick(draw, (1, 2)) if depth == 0 and shape.side > 4 else 1)


def convolution(draw: Draw, shape: Shape, cout: int, stride: int = 1) -> Drawn:
    kernel = pick(draw, (1, 3))
    made = step(
        "conv",
        cin=shape.channels,
        cout=cout,
        kernel=kernel,
        groups=pick(draw, [1, 1, *divisors(shape.channels, cout)]),
        dilation=pick(draw, (1, 1, 2)) if kernel == 3 else 1,
        stride=stride,
        bias=draw(st.booleans()),
    )
    return [made], replace(shape, channels=cout, side=-(-shape.side // stride))


def depthwise(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    cout = shape.channels * pick(draw, (1, 1, 2))
    if cout > MAX_WIDTH:
        return None
    bias = draw(st.booleans())
    made = step("conv", cin=shape.channels, cout=cout, kernel=3, groups=shape.channels, dilation=1, stride=1, bias=bias)
    return [made], replace(shape, channels=cout)


def up(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    if shape.side * 2 > MAX_SIDE:
        return None
    cout = pick(draw, WIDTHS)
    groups = pick(draw, [1, 1, *divisors(shape.channels, cout)])
    made = step("up", cin=shape.channels, cout=cout, groups=groups, bias=draw(st.booleans()))
    return [made], replace(shape, channels=cout, side=shape.side * 2)


def linear(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return projection(draw, shape, pick(draw, WIDTHS))


def projection(draw: Draw, shape: Shape, cout: int) -> Drawn:
    """To ``cout`` channels by a layer that fits the layout."""
    if not shape.tokens:
        return convolution(draw, shape, cout)
    made = step("linear", in_features=shape.channels, out_features=cout, bias=draw(st.booleans()))
    return [made], replace(shape, channels=cout)


# one value in, one out -----------------------------------------------------------------------------------------------


def bn(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("bn", num_features=shape.channels)], shape


def bn_relu(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("bn", num_features=shape.channels), step("relu_")], shape


def gn(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("gn", channels=shape.channels, groups=pick(draw, divisors(shape.channels)))], shape


def instance_norm(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    return ([step("in", channels=shape.channels)], shape) if shape.side > 1 else None


def ln(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("ln" if shape.tokens else "ln_image", normalized_shape=shape.channels)], shape


def act(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("act", name=pick(draw, list(ACTIVATIONS)))], shape


def prelu(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    if shape.tokens:
        return None
    return [step("prelu", num_parameters=pick(draw, (1, shape.channels)))], shape


def scale(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("scale", channels=shape.channels, dims=0 if shape.tokens else 2)], shape


def se(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("se", channels=shape.channels, hidden=pick(draw, (2, 4)), linear=draw(st.booleans()))], shape


def spatial_gate(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("spatial_gate", channels=shape.channels, pooled=draw(st.booleans()))], shape


def shuffle(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    groups = [d for d in divisors(shape.channels) if 1 < d < shape.channels]
    return ([step("shuffle", groups=pick(draw, groups))], shape) if groups else None


def gate(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    if shape.channels % 2 or shape.channels < 4:
        return None
    made = step("gate", dim=shape.dim, functional=draw(st.booleans()))
    return [made], replace(shape, channels=shape.channels // 2)


def resize(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    how = pick(draw, ("mean", "max", "nearest"))
    if shape.side < 4 if how != "nearest" else shape.side * 2 > MAX_SIDE:
        return None
    return [step("resize", how=how)], replace(shape, side=shape.side * 2 if how == "nearest" else shape.side // 2)


def pixels(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    down = draw(st.booleans())
    if down and shape.side % 2 == 0 and shape.side > 2 and shape.channels * 4 <= MAX_WIDTH:
        return [step("pixel_unshuffle", downscale_factor=2)], Shape(shape.channels * 4, shape.side // 2)
    if not down and shape.channels % 4 == 0 and shape.side * 2 <= MAX_SIDE:
        return [step("pixel_shuffle", upscale_factor=2)], Shape(shape.channels // 4, shape.side * 2)
    return None


def mix_tokens(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("mix_tokens", positions=shape.side)], shape


def attention(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("attention", channels=shape.channels, heads=pick(draw, (1, 2, 4)), width=pick(draw, (2, 4)))], shape


# pieces and movements ------------------------------------------------------------------------------------------------


def moved(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    kind = pick(draw, ("rotate", "roll", "pick"))
    if kind == "rotate":
        return ([step("rotate")], shape) if shape.channels % 2 == 0 else None
    return [step("roll", shift=pick(draw, (1, 2))) if kind == "roll" else step("pick", channels=shape.channels)], shape


def fold(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    blocks = [d for d in (2, 3) if shape.channels % d == 0 and shape.channels > d]
    if not blocks:
        return None
    count = pick(draw, blocks)
    made = step("fold", blocks=count, how=pick(draw, ("sum", "max")), inner=draw(st.booleans()))
    return [made], replace(shape, channels=shape.channels // count)


def broadcast(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("broadcast", channels=shape.channels)], shape


def einsum(draw: Draw, shape: Shape, depth: int) -> Drawn:
    cout = pick(draw, WIDTHS)
    return [step("einsum", cin=shape.channels, cout=cout)], replace(shape, channels=cout)


def tied(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("tied", channels=shape.channels, hidden=pick(draw, (4, 6)))], shape


def looks(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("looks", channels=shape.channels, heads=pick(draw, (1, 2, 4)), width=pick(draw, (2, 4)))], shape
