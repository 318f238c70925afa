"""Settings of ``attrim finetune``, and what a run folder contributes to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from attrim.cli.runs import CONFIG_FILE
from attrim.errors import InputError
from attrim.recover.recipe import Optimizer, Precision, Recipe, Schedule
from attrim.ship.store import PLAN_FILE

__all__ = ["FinetuneSettings", "complete"]

_OF_MODEL = ("weights", "pretrained", "num_classes", "input")
_OF_DATA = ("data", "mean", "std")


class FinetuneSettings(BaseModel):
    """Every option of ``attrim finetune`` under its long name, with underscores. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid")

    source: str
    model: str | None = None
    weights: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    input: str | None = None
    device: str = "auto"

    data: str | None = None
    limit: int | None = None
    batch_size: int = 128
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = True
    randaugment: str | None = None

    epochs: int = 3
    lr: float = 0.01
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    ema: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: Precision = "no"

    teacher: Literal["original", "none"] | None = None
    distill: float = 0.5
    temperature: float = 4.0
    attention: float = 0.0
    label_smoothing: float = 0.0

    every_minutes: float | None = None
    tensorboard: bool = False
    seed: int = 0
    out: str
    overwrite: bool = False

    def recipe(self) -> dict[str, Any]:
        """The options that :func:`attrim.recover.finetune` takes under the same names.

        Raises:
            InputError: one is out of its range.
        """
        names = [name for name in Recipe.__dataclass_fields__ if name in type(self).model_fields]
        options = {name: getattr(self, name) for name in names}
        alone = {**options, "attention": min(0.0, self.attention), "folder": self.out}  # its teacher is built later
        Recipe(**alone).check(None)
        return options


def complete(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings with model, weights, input and images of the run folder, where the source is one.

    Raises:
        InputError: the folder holds no result of a run, or options do not go together.
    """
    folder = Path(settings.source)
    if not folder.is_dir():
        if settings.teacher == "original":
            raise InputError(
                f"--teacher original is the network before a cut, and '{settings.source}' is not a run folder of attrim "
                "prune. Use --teacher none."
            )
        resolved = settings.model_copy(update={"model": settings.source, "teacher": "none"})
    else:
        if Path(settings.out).resolve() == folder.resolve():
            raise InputError(f"--out: '{settings.out}' is the run to start from. Choose another folder for the result.")
        run = _read_run(folder)
        typed = [name for name in _OF_MODEL if getattr(settings, name) not in (None, False)]
        if typed and settings.model is None:
            option = f"--{typed[0].replace('_', '-')}"
            raise InputError(f"{option} is for a MODEL; '{settings.source}' is a run folder and knows its own.")
        update = {name: run.get(name) for name in _OF_MODEL} | {"model": run["model"]}
        update |= {"pretrained": bool(run.get("pretrained")), "flip": settings.flip and bool(run.get("flip", True))}
        update |= {name: run.get(name) for name in _OF_DATA if getattr(settings, name) is None}
        resolved = FinetuneSettings.model_validate(
            settings.model_dump() | update | {"teacher": settings.teacher or "original"}
        )
    if resolved.data is None:
        raise InputError("fine-tuning needs images to train on. Add --data PATH.")
    if resolved.attention and resolved.teacher == "none":
        raise InputError("--attention compares with a teacher, and there is none. Use --teacher original with a RUN.")
    return resolved


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    missing = [name for name in (CONFIG_FILE, PLAN_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"'{folder}' has no {' and no '.join(missing)}: expected a folder that attrim prune or attrim finetune wrote "
            "to its end. An unfinished one goes on with --resume."
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read '{file}': {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not values.get("model"):
        raise InputError(f"'{file}' names no model: expected the settings of a run of attrim prune.")
    return values
