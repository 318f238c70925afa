"""Stages of a method on disk: what is finished is read again, and never by another run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from attrim.core.plan import write_atomic
from attrim.errors import CheckpointError
from attrim.modules.distributed import rank

__all__ = ["Stages"]

FILE = "stages.json"


class Stages:
    """The finished stages of one run of a method, in one folder.

    ``stages.json`` says whose run it is; a stage's tensors lie in ``NAME.safetensors``, written whole or not at all.

    Args:
        folder: made at the first write; None keeps nothing.
        identity: what the result depends on, as plain values.
        resume: whether an earlier run is expected there.

    Raises:
        CheckpointError: the folder holds a run and ``resume`` was not asked for, or another run (differences are named).
    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, Any], resume: bool) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity = json.loads(json.dumps(dict(identity)))
        if self.folder is None or not (self.folder / FILE).is_file():
            self.fresh = True
            return
        self.fresh = False
        if not resume:
            raise CheckpointError(
                f"'{self.folder}' holds an earlier run. Pass resume=True to go on with it, or choose another folder."
            )
        self._compare(self.folder / FILE)

    def begin(self) -> None:
        """Write down whose run this is."""
        if self.folder is not None and self.fresh and rank() == 0:
            write_atomic(self.folder / FILE, json.dumps({"identity": self.identity}, indent=1).encode())

    def path(self, name: str) -> Path | None:
        """Where a stage's own files go."""
        return None if self.folder is None else self.folder / name

    def has(self, name: str) -> bool:
        """Whether a stage is finished."""
        path = self.path(f"{name}.safetensors")
        return path is not None and path.is_file()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a finished stage."""
        path = self.path(f"{name}.safetensors")
        if path is not None and rank() == 0:
            write_atomic(path, serialise({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a finished stage.

        Raises:
            CheckpointError: they cannot be read.
        """
        path = self.path(f"{name}.safetensors")
        try:
            return deserialise(path.read_bytes()) if path is not None else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{path}' is damaged: {error}. Delete it, and the stage is done once more."
            ) from error

    def _compare(self, path: Path) -> None:
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{path}' is damaged ({error}). Start anew in another folder.") from error
        different = [name for name in {**self.identity, **theirs} if self.identity.get(name) != theirs.get(name)]
        if different:
            there = ", ".join(f"{name}={theirs.get(name)!r}" for name in different)
            here = ", ".join(f"{name}={self.identity.get(name)!r}" for name in different)
            raise CheckpointError(
                f"'{path}' belongs to another run: it was made with {there}, found {here}. Pass the same model and settings, "
                "or start anew in another folder."
            )
