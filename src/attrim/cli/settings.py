"""Settings of a run: defaults, then the file of ``--config``, then what was typed; all go into ``config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attrim.core.budget import Budget, Scope
from attrim.errors import InputError
from attrim.methods.table import METHODS

__all__ = ["PruneSettings", "keep_on", "merge", "parse_options"]

S = TypeVar("S", bound=BaseModel)


class PruneSettings(BaseModel):
    """Every option of ``attrim prune`` under its long name, with underscores. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    weights: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    input: str | None = None
    device: str = "auto"

    method: str = "l2"
    option: dict[str, Any] = {}
    samples: int = 1024

    keep_macs: float | None = None
    keep_params: float | None = None
    keep_channels: float | None = None
    min_keep: int | float = 0.1
    multiple_of: int = 1
    max_removed: float = 1.0
    frozen: tuple[str, ...] = ()
    scope: Scope = "global"

    data: str | None = None
    limit: int | None = None
    batch_size: int = 128
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flip: bool = True
    randaugment: str | None = None

    rounds: Annotated[int, Field(ge=1)] = 1
    recover: Literal["free", "recalibrate", "none"] = "free"
    finetune_epochs: int = 0
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    distill: bool = True

    seed: int = 0
    out: str
    overwrite: bool = False

    @model_validator(mode="after")
    def _every_option(self) -> PruneSettings:
        """The options of a method, with those that were not given, so that the run's file holds all of them."""
        if self.method in METHODS:
            self.option = {**METHODS[self.method].options, **self.option}
        return self

    def budget(self) -> Budget:
        """The limits as attrim's own noun.

        Raises:
            InputError: no limit was given.
            BudgetError: a limit is out of its range.
        """
        if self.keep_macs is None and self.keep_params is None and self.keep_channels is None:
            raise InputError(
                "how small? Give at least one of --keep-macs, --keep-params and --keep-channels, each the fraction "
                "that is kept; --keep-macs 0.5 keeps half of the multiply-adds."
            )
        return Budget(
            macs=self.keep_macs,
            params=self.keep_params,
            channels=self.keep_channels,
            min_keep=self.min_keep,
            multiple_of=self.multiple_of,
            max_removed=self.max_removed,
            frozen=self.frozen,
            scope=self.scope,
        )


def merge(
    context: typer.Context, typed: Mapping[str, Any], config: Path | None, kind: type[S], command: str = "prune"
) -> S:
    """Settings from defaults, a YAML file and the command line; the later wins.

    Args:
        context: knows which options were typed and which are defaults.
        typed: option name -> value, for all options.
        config: a file as ``attrim prune`` or ``attrim finetune`` writes it, or a part of one.
        kind: which settings.
        command: their command, for messages.

    Raises:
        InputError: the file is missing, is not YAML, or holds names or values that are no options.
    """
    values = {name: value for name, value in typed.items() if value is not None and not _explicit(context, name)}
    values |= _read(config) if config is not None else {}
    values |= {name: value for name, value in typed.items() if _explicit(context, name)}
    first = next(iter(kind.model_fields))
    text = "a MODEL, such as timm:resnet18" if first == "model" else "a run folder, or a MODEL such as timm:resnet18"
    for name, what in ((first, text), ("out", "--out DIR, where the run is written")):
        if values.get(name) is None:
            raise InputError(f"missing {what}.")
    return _validate(kind, values, config, command)


def keep_on(
    context: typer.Context, typed: Mapping[str, Any], config: Path | None, kind: type[S], command: str = "prune"
) -> S:
    """Settings of a run that goes on, from the ``config.yaml`` in its folder; from the command line if there is none.

    Raises:
        InputError: no folder, ``--config`` beside it, or an option typed now that differs from the run's own.
    """
    if typed.get("out") is None:
        raise InputError("--resume goes on with the run in --out DIR, and that is missing.")
    if config is not None:
        raise InputError("--resume takes the settings of the run itself. Leave out --config.")
    own = Path(typed["out"]) / "config.yaml"
    if not own.is_file():
        return merge(context, typed, None, kind, command)
    now = merge(context, typed, own, kind, command).model_dump()
    then = _validate(kind, _read(own) | {"out": typed["out"]}, own, command)
    for name, value in then.model_dump().items():
        if now[name] != value and name not in ("device", "overwrite"):
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"--resume goes on as the run in '{typed['out']}' was started, with {option} {value}; found {option} "
                f"{now[name]}. Leave it out, or start a new run in another folder."
            )
    return then


def _validate(kind: type[S], values: Mapping[str, Any], config: Path | None, command: str) -> S:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_complaint(error, config, command)) from error


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``["reduction=max", "power=1"]`` as a mapping; values are read as YAML.

    Raises:
        InputError: a pair has no ``=``.
    """
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--option: expected NAME=VALUE, such as reduction=max, found '{pair}'.")
        options[name.strip()] = yaml.safe_load(value)
    return options


def _explicit(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _read(config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config: cannot read '{config}': {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config: '{config}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config: expected 'name: value' lines in '{config}', found {type(values).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _complaint(error: ValidationError, config: Path | None, command: str) -> str:
    where = f"--config '{config}'" if config is not None else "options"
    problems = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"][:1])
        if problem["type"] == "extra_forbidden":
            problems.append(f"'{name}' is no option of attrim {command}")
        else:
            problems.append(f"'{name}': {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}")
    return f"{where}: {'; '.join(dict.fromkeys(problems))}."
