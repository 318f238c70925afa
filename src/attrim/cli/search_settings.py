"""Settings of ``attrim search``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field

from attrim.cli.settings import PruneSettings, keep_on, merge
from attrim.core.budget import Budget
from attrim.search.storage import hide_password

__all__ = ["SearchSettings", "settle"]

_FREE = ("evaluations", "workers", "storage")
"""What may be different each time that a search goes on."""


class SearchSettings(BaseModel):
    """Every option of ``attrim search`` under its long name, with underscores. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    weights: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    input: str | None = None
    device: str = "auto"

    criterion: str = "arpruning"
    option: dict[str, Any] = {}
    samples: int = 1024
    algorithm: str = "neighbourhood"
    evaluations: Annotated[int, Field(ge=1)] = 300
    start: str | None = None
    setting: dict[str, Any] = {}
    objective: Literal["fast", "naive"] | None = None
    recalibration: Annotated[int, Field(ge=1)] = 100
    refit: bool = False
    early_stop: bool = True
    memory: Annotated[float, Field(ge=0)] = 4.0
    storage: str | None = None
    study: str | None = None
    workers: Annotated[int, Field(ge=1)] = 1

    keep_macs: float | None = None
    keep_params: float | None = None
    keep_channels: float | None = None
    min_keep: int | float = 0.1
    multiple_of: int = 1
    max_removed: float = 1.0
    frozen: tuple[str, ...] = ()

    data: str | None = None
    limit: int | None = None
    batch_size: int = 128
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = True
    randaugment: str | None = None

    recover: Literal["free", "recalibrate", "none"] = "free"
    finetune_epochs: int = 0
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    distill: bool = True

    seed: int = 0
    out: str
    overwrite: bool = False

    def prune_settings(self) -> PruneSettings:
        """What it has in common with ``attrim prune``: model, budget, images, recovery."""
        common = set(PruneSettings.model_fields) & set(type(self).model_fields)
        return PruneSettings.model_validate({name: getattr(self, name) for name in common} | {"option": {}})

    def budget(self) -> Budget:
        """The limits; as for ``attrim prune``.

        Raises:
            InputError, BudgetError: no limit, or one out of its range.
        """
        return self.prune_settings().budget()

    def written(self) -> dict[str, Any]:
        """For ``config.yaml``: everything but what is secret."""
        values = self.model_dump(mode="json", exclude={"overwrite"})
        return values | {"storage": None if self.storage is None else hide_password(self.storage)}


def settle(context: typer.Context, typed: Mapping[str, Any], config: Path | None, resume: bool) -> SearchSettings:
    """Settings of a new search, or of one that goes on: its own, but for what may change each time.

    Raises:
        InputError: as for ``attrim prune``.
    """
    if not resume:
        return merge(context, typed, config, SearchSettings, "search")
    fixed = {name: value for name, value in typed.items() if name not in _FREE}
    own = keep_on(context, fixed, config, SearchSettings, "search")
    now = {name: typed[name] for name in _FREE if _typed(context, name)}
    return SearchSettings.model_validate(own.model_dump() | now)


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")
