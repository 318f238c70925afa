"""The folder of a run: ``config.yaml``, ``metrics.jsonl``, ``plan.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from attrim.core.plan import write_atomic
from attrim.errors import InputError
from attrim.ship.store import PLAN_FILE, WEIGHTS_FILE

__all__ = ["Run"]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
_FILES = (CONFIG_FILE, METRICS_FILE, PLAN_FILE, WEIGHTS_FILE)


class Run:
    """One run's folder. Made at the first write, so that a refused command leaves nothing behind.

    Args:
        folder: where the files go; other files in it are left alone.
        overwrite: replace an earlier run there. One that left no result is replaced in any case.

    Raises:
        InputError: the folder is a file, or holds the result of a run.
    """

    def __init__(self, folder: str | Path, *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self._begin = time.monotonic()
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out: '{folder}' is a file; expected a folder.")
        results = [name for name in (PLAN_FILE, WEIGHTS_FILE) if (self.folder / name).exists()]
        if results and not overwrite:
            raise InputError(
                f"--out: '{folder}' already holds a run ({', '.join(results)}). Choose another folder, "
                "or pass --overwrite."
            )

    def start(self, config: Mapping[str, Any]) -> None:
        """Clear an earlier run and write down every setting of this one."""
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomic(self.folder / CONFIG_FILE, text.encode())

    def log(self, step: str, **figures: Any) -> None:
        """Append one line to the metrics: the step, the seconds since the start, and its figures."""
        line = {"step": step, "elapsed": round(time.monotonic() - self._begin, 3), **figures}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
