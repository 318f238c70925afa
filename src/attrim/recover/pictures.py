"""Images of any kind made grey or RGB."""

from __future__ import annotations

from typing import Any

__all__ = ["in_channels"]


def in_channels(picture: Any, channels: int) -> Any:
    """An image with one channel (grey) or three (RGB), eight bits each.

    Transparency is dropped, not blended. Sixteen-bit grey is scaled down; Pillow's own conversion would clip it.

    Args:
        picture: a ``PIL.Image`` of any mode: grey, RGB, RGBA, palette, CMYK, sixteen bits, ...
        channels: 1 or 3.

    Returns:
        The ``PIL.Image`` in mode ``L`` or ``RGB``.

    Example:
        >>> in_channels(Image.open("icon.png"), 3).mode
        'RGB'
    """
    mode = "L" if channels == 1 else "RGB"
    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I;16"):
        import numpy as np
        from PIL import Image

        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns
    return picture.convert(mode)
