"""How a random network is drawn: one small function a kind, from the shape of a value to steps and the next shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from hypothesis import strategies as st

from .networks import MAX_WIDTH, Network, Shape, Step, step
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


# branches ------------------------------------------------------------------------------------------------------------


def residual(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    """Identity, projected, or padded with zero channels."""
    shortcut = pick(draw, ("identity", "projection", "pad"))
    if shortcut == "identity" or (shortcut == "pad" and shape.tokens):
        return [step("residual", body(draw, shape, depth, shape.channels), [])], shape
    if shortcut == "projection":
        cout = pick(draw, WIDTHS)
        aside = projection(draw, shape, cout)[0]
    else:
        before, after = draw(st.integers(0, 3)), draw(st.integers(1, 4))
        cout = shape.channels + before + after
        aside = [step("pad", before=before, after=after)]
    return [step("residual", body(draw, shape, depth, cout), aside)], replace(shape, channels=cout)


def concat(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    widths = draw(st.lists(st.sampled_from((2, 4, 6)), min_size=1, max_size=3))
    keep = len(widths) == 1 or draw(st.booleans())
    total = sum(widths) + (shape.channels if keep else 0)
    if total > MAX_WIDTH:
        return None
    branches = [body(draw, shape, depth, width) for width in widths]
    return [step("concat", *branches, keep=keep, dim=shape.dim)], replace(shape, channels=total)


def chunk(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    if shape.channels % 2:
        return None
    half = replace(shape, channels=shape.channels // 2)
    join = pick(draw, ("concat", "sum"))
    width = pick(draw, (2, 4, 6))
    other = width if join == "sum" else pick(draw, (2, 4, 6))
    first = [] if join == "concat" and draw(st.booleans()) else body(draw, half, depth, width)
    total = width if join == "sum" else other + (width if first else half.channels)
    made = step("chunk", first, body(draw, half, depth, other), join=join, dim=shape.dim)
    return [made], replace(shape, channels=total)


def split(draw: Draw, shape: Shape, depth: int) -> Drawn:
    part = draw(st.integers(1, shape.channels - 1))
    rest = replace(shape, channels=shape.channels - part)
    width = pick(draw, (2, 4, 6))
    made = step("split", body(draw, rest, depth, width), sizes=(part, rest.channels), dim=shape.dim)
    return [made], replace(shape, channels=part + width)


def twice(draw: Draw, shape: Shape, depth: int) -> Drawn:
    return [step("twice", body(draw, shape, depth, shape.channels))], shape


def body(draw: Draw, shape: Shape, depth: int, cout: int) -> list[Step]:
    """Steps that keep the positions and end at ``cout`` channels in a fresh tensor."""
    inner, at = several(draw, shape, TOKEN_BODY if shape.tokens else IMAGE_BODY, depth + 1, 0, 2)
    return inner + projection(draw, at, cout)[0]


# whole networks ------------------------------------------------------------------------------------------------------

SIMPLE = (conv, bn, act, depthwise)
FLAVOURS: dict[str, tuple[Maker, ...]] = {
    "chains": (*SIMPLE, residual, bn_relu, prelu, scale, up, resize, twice, instance_norm),
    "branches": (*SIMPLE, residual, concat, chunk, split, shuffle, gate),
    "gates": (*SIMPLE, se, spatial_gate, gn, ln, residual, pixels, gate),
    "tokens": (conv, bn, act, residual),
}
IMAGE_BODY: tuple[Maker, ...] = (
    conv, act, bn, bn_relu, depthwise, prelu, scale, instance_norm, se, gate, shuffle, concat, residual, chunk,
)  # fmt: skip
TOKEN_STEPS: tuple[Maker, ...] = (
    linear, act, ln, scale, residual, gate, concat, chunk, split, twice, mix_tokens, attention,
)  # fmt: skip
TOKEN_BODY: tuple[Maker, ...] = (linear, act, ln, scale, gate, concat, residual, mix_tokens)
BRANCHING = {residual, concat, chunk, split, twice}


def several(draw: Draw, shape: Shape, makers: Sequence[Maker], depth: int, least: int, most: int) -> Drawn:
    """``least`` to ``most`` kinds from ``makers``; branches nest twice at the deepest."""
    if depth >= 2:
        makers = [maker for maker in makers if maker not in BRANCHING]
    made: list[Step] = []
    for _ in range(draw(st.integers(least, most))):
        result = pick(draw, makers)(draw, shape, depth)
        if result is not None:
            made, shape = made + result[0], result[1]
    return made, shape


@st.composite
def networks(draw: Draw, flavour: str) -> Network:
    """A network of the flavour: a first convolution, two to five drawn steps, a head.

    Widths stay at or below about ``MAX_WIDTH``; the drawn numbers shrink towards fewer, narrower, plainer steps.
    """
    parts, shape = convolution(draw, Shape(3, 8), pick(draw, WIDTHS))
    drawn, shape = several(draw, shape, FLAVOURS[flavour], 0, 1, 5 if flavour != "tokens" else 2)
    parts += drawn
    if flavour == "tokens":
        parts.append(step("tokens"))
        drawn, shape = several(draw, Shape(shape.channels, shape.positions, tokens=True), TOKEN_STEPS, 0, 1, 4)
        parts += drawn
    flat = draw(st.booleans())
    parts.append(step("head", channels=shape.channels, positions=shape.positions, tokens=shape.tokens, flat=flat))
    return Network(tuple(parts), draw(st.integers(0, 3)))
