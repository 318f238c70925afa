"""Checks of what is to be drawn: numbers, their number, and names that fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from attrim.errors import InputError

__all__ = ["FloatArray", "filled", "numbers", "same_length", "seeds"]

FloatArray = npt.NDArray[np.float64]

_M = TypeVar("_M", bound=Mapping[Any, Any])


def filled(what: str, values: _M) -> _M:
    """A mapping that is not empty.

    Raises:
        InputError: no mapping, or nothing in it.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{what}: expected a mapping from names to values, found {type(values).__name__}.")
    if not values:
        raise InputError(f"{what}: nothing to draw; expected at least one entry.")
    return values


def numbers(what: str, values: Any, ndim: int = 1, *, finite: bool = True) -> FloatArray:
    """An array of ``ndim`` dimensions with at least one number; tensors are welcome.

    Raises:
        InputError: not numbers, another number of dimensions, empty, or not finite.
    """
    found = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    try:
        array = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: expected numbers, all rows of the same length; found {_short(values)}.") from error
    if array.ndim != ndim:
        raise InputError(f"{what}: expected {ndim} dimension(s), found the shape {array.shape}.")
    if not array.size:
        raise InputError(f"{what}: nothing to draw; expected at least one number.")
    if finite and not np.isfinite(array).all():
        raise InputError(f"{what}: {int((~np.isfinite(array)).sum())} of {array.size} numbers are not finite.")
    return array


def seeds(what: str, value: Any) -> FloatArray:
    """One number, or one for each seed, as an array of shape ``(seeds,)``.

    Raises:
        InputError: as for :func:`numbers`.
    """
    return numbers(what, [value] if np.ndim(value) == 0 else value)


def same_length(what: str, values: Sequence[Any] | FloatArray, other: str, length: int) -> None:
    """Check that two things have the same length.

    Raises:
        InputError: they have not.
    """
    if len(values) != length:
        raise InputError(f"{what}: expected {length} values, one for each of {other}; found {len(values)}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
