"""Finished rounds on disk: a folder a round, and one file that says which are finished and of which run they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attrim.core.budget import Budget
from attrim.core.plan import PruningPlan, write_atomic
from attrim.errors import CheckpointError
from attrim.modules.distributed import rank
from attrim.modules.names import fingerprint, named_tensors
from attrim.recover.keeper import weights_digest
from attrim.ship.store import PLAN_FILE, load, save

__all__ = ["RoundStore", "identity"]

FILE = "rounds.json"
VERSION = 1

Steps = list[Mapping[str, Any]]


class RoundStore:
    """The rounds of one run in one folder.

    ``round-1/``, ``round-2/`` … hold what :func:`attrim.save` writes, the plan counted from the original; ``rounds.json``
    names those that are whole and is written after them, so a kill at any moment costs the round in work at most. With
    several processes the first one writes, and all read.

    Args:
        folder: made at the first write; None keeps nothing.
        mine: what the result depends on, see :func:`identity`.
    """

    def __init__(self, folder: str | Path | None, mine: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.mine = json.loads(json.dumps(mine))
        self._finished: list[Steps] = []

    def take_up(self, model: nn.Module, resume: bool) -> tuple[nn.Module, PruningPlan, list[Steps]] | None:
        """The last finished round: its network, the plan from the original, and the steps of every round; None to begin.

        Args:
            model: the original.
            resume: whether rounds on disk are expected.

        Raises:
            CheckpointError: the folder holds rounds and ``resume`` was not asked for, or those of another run.
            InputError, PlanError: a finished round is damaged.
        """
        if self.folder is None or not (self.folder / FILE).is_file():
            return None
        if not resume:
            raise CheckpointError(
                f"'{self.folder}' holds the rounds of an earlier run. Pass resume=True to go on with it, or choose another "
                "folder."
            )
        state = self._read(self.folder / FILE)
        self._finished = state["finished"]
        if not self._finished:
            return None
        last = self._round(len(self._finished))
        return load(last, model), PruningPlan.load(last / PLAN_FILE), list(self._finished)

    def add(self, model: nn.Module, plan: PruningPlan, steps: Steps) -> None:
        """Keep a finished round."""
        self._finished = [*self._finished, steps]
        if self.folder is None or rank() != 0:
            return
        save(model, plan, self._round(len(self._finished)))
        state = {"version": VERSION, "identity": self.mine, "finished": self._finished}
        write_atomic(self.folder / FILE, json.dumps(state, indent=1).encode())

    def _round(self, number: int) -> Path:
        return (self.folder or Path()) / f"round-{number}"

    def _read(self, path: Path) -> Any:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            theirs, version = state["identity"], state["version"]
            state["finished"] = list(state["finished"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{path}' is damaged ({type(error).__name__}: {error}). Start anew in another folder."
            ) from error
        if version != VERSION:
            raise CheckpointError(f"'{path}' has version {version!r}, this attrim reads {VERSION}.")
        different = [name for name in {**self.mine, **theirs} if self.mine.get(name) != theirs.get(name)]
        if different:
            there = ", ".join(f"{name}={theirs.get(name)!r}" for name in different)
            here = ", ".join(f"{name}={self.mine.get(name)!r}" for name in different)
            raise CheckpointError(
                f"'{path}' belongs to another run: it was made with {there}, found {here}. Pass the same model and "
                "settings as in the first call, or start anew in another folder."
            )
        return state


def identity(model: nn.Module, budget: Budget, **settings: Any) -> dict[str, Any]:
    """What the result of a run depends on, as plain values; objects are known by the name of their type."""
    return {
        "fingerprint": fingerprint(named_tensors(model).shapes),
        "weights": weights_digest(model),
        "budget": _plain(dataclasses.asdict(budget)),
        **{name: _plain(value) for name, value in settings.items()},
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(getattr(value, "__qualname__", type(value).__qualname__))
