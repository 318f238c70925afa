"""Drawing a whole network: branches and chains of the operators in :mod:`.makers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from .makers import (
    WIDTHS,
    Draw,
    Drawn,
    Maker,
    act,
    attention,
    bn,
    bn_relu,
    broadcast,
    conv,
    depthwise,
    einsum,
    fold,
    gate,
    gn,
    instance_norm,
    linear,
    ln,
    looks,
    mix_tokens,
    moved,
    pick,
    pixels,
    prelu,
    projection,
    resize,
    scale,
    se,
    shuffle,
    spatial_gate,
    tied,
    up,
)
from .networks import MAX_WIDTH, Network, Shape, Step, step

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


def thirds(draw: Draw, shape: Shape, depth: int) -> Drawn | None:
    if shape.channels % 3:
        return None
    third = replace(shape, channels=shape.channels // 3)
    return [step("thirds", body(draw, third, depth, third.channels), dim=shape.dim)], third


def interleave(draw: Draw, shape: Shape, depth: int) -> Drawn:
    width = pick(draw, (2, 4, 6))
    made = step("interleave", body(draw, shape, depth, width), body(draw, shape, depth, width))
    return [made], replace(shape, channels=2 * width)


def stack(draw: Draw, shape: Shape, depth: int) -> Drawn:
    width = pick(draw, WIDTHS)
    branches = [body(draw, shape, depth, width) for _ in range(pick(draw, (2, 3)))]
    return [step("stack", *branches, learned=draw(st.booleans()))], replace(shape, channels=width)


# whole networks ------------------------------------------------------------------------------------------------------

SIMPLE = (conv, bn, act, depthwise)
FLAVOURS: dict[str, tuple[Maker, ...]] = {
    "chains": (*SIMPLE, residual, bn_relu, prelu, scale, up, resize, twice, instance_norm),
    "branches": (*SIMPLE, residual, concat, chunk, split, shuffle, gate),
    "gates": (*SIMPLE, se, spatial_gate, gn, ln, residual, pixels, gate),
    "pieces": (
        conv, act, bn, residual, thirds, moved, fold, broadcast, einsum, tied, interleave, stack, chunk, shuffle,
    ),
    "tokens": (conv, bn, act, residual),
}  # fmt: skip
IMAGE_BODY: tuple[Maker, ...] = (
    conv, act, bn, bn_relu, depthwise, prelu, scale, instance_norm, se, gate, shuffle, concat, residual, chunk,
)  # fmt: skip
TOKEN_STEPS: tuple[Maker, ...] = (
    linear, act, ln, scale, residual, gate, concat, chunk, split, twice, mix_tokens, attention, looks, thirds, stack,
)  # fmt: skip
TOKEN_BODY: tuple[Maker, ...] = (linear, act, ln, scale, gate, concat, residual, mix_tokens)
BRANCHING = {residual, concat, chunk, split, twice, thirds, interleave, stack}


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
    first, wide = pick(draw, (1, 3)), pick(draw, WIDTHS)
    parts = [step("conv", cin=3, cout=wide, kernel=first, groups=1, dilation=1, stride=1, bias=draw(st.booleans()))]
    shape = Shape(wide, 8)
    drawn, shape = several(draw, shape, FLAVOURS[flavour], 0, 1, 5 if flavour != "tokens" else 2)
    parts += drawn
    if flavour == "tokens":
        parts.append(step("tokens"))
        drawn, shape = several(draw, Shape(shape.channels, shape.positions, tokens=True), TOKEN_STEPS, 0, 1, 4)
        parts += drawn
    if flavour == "pieces" and draw(st.booleans()):
        return Network((*parts, step("several", channels=shape.channels)), draw(st.integers(0, 3)))
    flat = draw(st.booleans())
    parts.append(step("head", channels=shape.channels, positions=shape.positions, tokens=shape.tokens, flat=flat))
    return Network(tuple(parts), draw(st.integers(0, 3)))
