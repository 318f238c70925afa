"""Scores: how important each channel of each group is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attrim.errors import CriterionError

__all__ = ["Scores"]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One float per channel of each scored group; larger means more important.

    Attributes:
        values: group id -> tensor of shape ``(group.size,)``; anything ``torch.as_tensor`` takes is accepted and
            stored as float32 on the CPU. A group that is missing here is left whole by :func:`attrim.allocate`.
        criterion: the name of what computed them, for reports.

    Raises:
        CriterionError: a value is not one-dimensional, or is not finite.

    Example:
        >>> Scores({"conv1": [0.1, 0.7]}, "mine").values["conv1"]
        tensor([0.1000, 0.7000])
    """

    values: Mapping[str, Tensor]
    criterion: str

    def __post_init__(self) -> None:
        clean: dict[str, Tensor] = {}
        for group, value in self.values.items():
            vector = torch.as_tensor(value).detach().to(device="cpu", dtype=torch.float32)
            if vector.ndim != 1:
                raise CriterionError(
                    f"criterion '{self.criterion}': expected one score per channel of group '{group}' (a vector), "
                    f"found shape {tuple(vector.shape)}."
                )
            bad = int((~torch.isfinite(vector)).sum())
            if bad:
                raise CriterionError(
                    f"criterion '{self.criterion}': {bad} of {vector.numel()} scores of group '{group}' are NaN or "
                    "infinite. Look for NaN in the weights or the data: "
                    "[n for n, p in model.named_parameters() if not p.isfinite().all()]."
                )
            clean[group] = vector
        object.__setattr__(self, "values", clean)
