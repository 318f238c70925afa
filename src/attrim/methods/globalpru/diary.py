"""What happened, epoch by epoch, on disk: a run that goes on still knows how it began."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrim.core.plan import write_atomic
from attrim.errors import CheckpointError
from attrim.modules.distributed import rank

__all__ = ["Diary"]


class Diary:
    """Entries in order, each under its own key.

    Args:
        path: a JSON file; None keeps them in memory only.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            try:
                self.entries = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"'{path}' is damaged: {error}. Delete it; only figures are lost.") from error

    def once(self, key: str, entry: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The entry of that key, made and written now if there is none."""
        if key not in self.entries:
            self.entries[key] = json.loads(json.dumps(dict(entry())))
            if self.path is not None and rank() == 0:
                write_atomic(self.path, json.dumps(self.entries, indent=1).encode())
        return self.entries[key]

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        """Entries whose ``stage`` is this one."""
        return [entry for entry in self.entries.values() if entry.get("stage") == stage]
