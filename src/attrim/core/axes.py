"""An axis: one dimension of one named parameter or buffer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Axis"]


@dataclass(frozen=True, slots=True, order=True)
class Axis:
    """One dimension of one tensor of a model; prints as ``layer1.0.conv2.weight:0``.

    Attributes:
        tensor: the name of the parameter or buffer, as in ``named_parameters()`` (the first name of a tied one).
        dim: the dimension, counted from 0.
    """

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"
