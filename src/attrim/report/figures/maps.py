"""Attention maps of images, as they are and with some channels gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attrim.errors import InputError
from attrim.report.figures.canvas import SMALL, WIDTH, Picture, finish, new_figure, styled
from attrim.report.figures.check import FloatArray, filled, numbers

__all__ = ["attention_maps", "map_change"]

_MOST_IMAGES, _MOST_PIXELS = 8, 96


def attention_maps(
    images: Any,
    whole: Any,
    without: Mapping[str, Any],
    *,
    title: str = "Attention maps with channels removed",
) -> Picture:
    """A row for each image: the image, the layer's attention map, and the map without some of the channels.

    Below each map stands how far it is from the whole one: ``||Q - Q'||`` with maps of unit length, from 0 (the same) to
    1.41 (nothing in common).

    Args:
        images: shape ``(N, H, W, 3)`` or ``(N, H, W)``, in [0, 1] or any range; each is stretched to its own.
        whole: shape ``(N, h, w)``, non-negative: the map of all channels.
        without: heading of a column (``"without the lowest half"``) -> maps of the same shape.
        title: heading.

    Raises:
        InputError: shapes that do not fit, no image, more than 8, or negative maps.

    Example:
        >>> attention_maps(pixels, maps, {"without the lowest half": low, "without the highest half": high}).save("maps.svg")
    """
    pictures = numbers("images", images, np.ndim(images) if np.ndim(images) in (3, 4) else 4)
    if pictures.ndim == 4 and pictures.shape[-1] != 3:
        raise InputError(f"images: expected the shape (N, H, W, 3) or (N, H, W), found {pictures.shape}.")
    if len(pictures) > _MOST_IMAGES:
        raise InputError(
            f"images: at most {_MOST_IMAGES} are readable in one picture, found {len(pictures)}. Pass some of them."
        )
    full = _maps("whole", whole, None)
    if len(full) != len(pictures):
        raise InputError(f"whole: expected {len(pictures)} maps, one for each image; found {len(full)}.")
    columns = {str(name): _maps(f"'{name}'", m, full.shape) for name, m in filled("without", without).items()}
    changes = {name: map_change(full, found) for name, found in columns.items()}
    pixels = _MOST_PIXELS if len(pictures) <= 4 else _MOST_PIXELS * 2 // 3
    side = (WIDTH - 0.2) / (2 + len(columns))
    with styled():
        figure = new_figure(len(pictures) * (side + 0.08) + 0.85)
        panels = figure.subplots(len(pictures), 2 + len(columns), squeeze=False)
        for row, line in enumerate(panels):
            _show(line[0], _stretch(_smaller(pictures[row], pixels)), "image" if not row else "", "gray")
            _show(line[1], _smaller(full[row], pixels), "all channels" if not row else "")
            for axes, (name, found) in zip(line[2:], columns.items(), strict=True):
                _show(
                    axes,
                    _smaller(found[row], pixels),
                    f"{name}\nmean change {changes[name].mean():.2f}" if not row else "",
                )
                axes.set_xlabel(f"{changes[name][row]:.2f}", fontsize=SMALL, labelpad=2)
        words = ", ".join(f"{name} {change.mean():.2f}" for name, change in changes.items())
        return finish(figure, title, f"Attention maps of {len(pictures)} images; mean change of the map: {words}.")


def map_change(whole: FloatArray, other: FloatArray) -> FloatArray:
    """Distance of maps of unit length, shape ``(N,)``; a map of zeros has no direction and counts as it is.

    Example:
        >>> map_change(np.ones((1, 2, 2)), np.ones((1, 2, 2)))
        array([0.])
    """
    return np.asarray(np.linalg.norm(_unit(whole) - _unit(other), axis=1), dtype=np.float64)


def _unit(maps: FloatArray) -> FloatArray:
    flat = maps.reshape(len(maps), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.where(length > 0, length, 1.0), dtype=np.float64)


def _maps(what: str, values: Any, shape: tuple[int, ...] | None) -> FloatArray:
    maps = numbers(what, values, 3)
    if (maps < 0).any():
        raise InputError(f"{what}: expected attention maps, which are not negative.")
    if shape is not None and maps.shape != shape:
        raise InputError(f"{what}: expected the shape {shape} of the whole maps, found {maps.shape}.")
    return maps


def _smaller(image: FloatArray, side: int) -> FloatArray:
    """Means of square blocks, so that no side has more pixels than can be seen (and the file stays small)."""
    k = -(-max(image.shape[:2]) // side)
    if k == 1:
        return image
    rows, columns = (np.arange(0, n, k) for n in image.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(image, rows, axis=0), columns, axis=1)
    count = np.diff([*rows, image.shape[0]])[:, None] * np.diff([*columns, image.shape[1]])[None]
    return np.asarray(sums / (count if image.ndim == 2 else count[..., None]), dtype=np.float64)


def _stretch(image: FloatArray) -> FloatArray:
    low, high = image.min(), image.max()
    return np.asarray((image - low) / (high - low if high > low else 1.0), dtype=np.float64)


def _show(axes: Any, values: FloatArray, title: str, colours: str = "inferno") -> None:
    """An image, or a map on its own scale: only the pattern counts."""
    top = float(values.max()) or 1.0
    axes.imshow(values, cmap=colours, vmin=0, vmax=top, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=SMALL)
