"""Selections: a layer that reads only some positions of an input that stays whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attrim.core.branches import within

__all__ = ["Selection", "read_selects"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a layer reads of its input.

    Attributes:
        dim: dimension of the input, counted from the end: -1 for a linear layer, -3 for a two-dimensional convolution.
        keep: positions that are read, ascending. Of a layer that selects already they are positions of its selection.
    """

    dim: int
    keep: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The layout of the plan file."""
        return {"dim": self.dim, "keep": list(self.keep)}

    def then(self, following: Selection) -> Selection:
        """This selection followed by one of what it gives.

        Raises:
            ValueError: the second reads positions that the first does not give, or another dimension.
        """
        if following.dim != self.dim or following.keep[-1] >= len(self.keep):
            raise ValueError(
                f"the first gives {len(self.keep)} positions of dimension {self.dim}, the second reads position "
                f"{following.keep[-1]} of dimension {following.dim}"
            )
        return Selection(self.dim, tuple(self.keep[i] for i in following.keep))


def read_selects(data: Any, drops: Collection[str]) -> dict[str, Selection]:
    """Read and check the entry ``selects`` of a plan file.

    Raises:
        ValueError: an impossible selection, or one in front of a module that is removed.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"'selects' should map module paths to selections, found {type(data).__name__}")
    found = {}
    for path, item in data.items():
        keep = np.asarray(item["keep"])
        legal = keep.ndim == 1 and keep.size > 0 and np.issubdtype(keep.dtype, np.integer)
        if not legal or keep[0] < 0 or (np.diff(keep) <= 0).any():
            raise ValueError(f"'selects' of '{path}': expected at least one position, ascending, from 0 on")
        if type(item["dim"]) is not int or item["dim"] >= 0:
            raise ValueError(f"'selects' of '{path}': 'dim' counts from the end (-1, -2, …), found {item['dim']!r}")
        if within(str(path), drops):
            raise ValueError(f"'selects' names '{path}', which goes with 'drops'")
        found[str(path)] = Selection(item["dim"], tuple(keep.tolist()))
    return found
