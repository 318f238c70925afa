"""The folder of a run: settings, metrics and result, and what an unfinished run needs to go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from attrim.cli.screen import is_main
from attrim.core.plan import write_atomic
from attrim.errors import InputError
from attrim.recover.checkpoint import Checkpoints
from attrim.ship.store import PLAN_FILE, WEIGHTS_FILE

__all__ = ["CONFIG_FILE", "Run"]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
_FILES = (CONFIG_FILE, METRICS_FILE, PLAN_FILE, WEIGHTS_FILE)
_CUT, _TRAINING, _ROUNDS, _METHOD = "cut", "training", "rounds", "method"


class Run:
    """One run's folder. Made at the first write, so that a refused command leaves nothing behind.

    The result is ``config.yaml``, ``metrics.jsonl``, ``plan.json`` and ``model.safetensors``. While a run is under way
    ``cut/`` holds the verified network, ``rounds/`` those of finished rounds, ``method/`` the finished stages of a method
    and ``training/`` the checkpoints; all but ``method/`` (gates and statistics) are gone at the end. Of several processes only the main one writes.

    Args:
        folder: where the files go; other files in it are left alone.
        overwrite: replace an earlier run there. One that left nothing to go on with is replaced in any case.
        resume: go on with the run there.

    Raises:
        InputError: the folder is a file, or holds the result of a run or a run that could be resumed.
    """

    def __init__(self, folder: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.folder = Path(folder)
        self._begin = time.monotonic()
        self._done: frozenset[str] = frozenset()
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out: '{folder}' is a file; expected a folder.")
        results = [name for name in (PLAN_FILE, WEIGHTS_FILE) if (self.folder / name).exists()]
        if overwrite or resume or not is_main():
            return
        if self.unfinished:
            raise InputError(
                f"--out: '{folder}' holds a run that was not finished. Pass --resume to go on with it, --overwrite to "
                "begin anew, or choose another folder."
            )
        if results:
            raise InputError(
                f"--out: '{folder}' already holds a run ({', '.join(results)}). Choose another folder, "
                "or pass --overwrite."
            )

    @property
    def cut(self) -> Path:
        """Where the verified network lies until the run is finished."""
        return self.folder / _CUT

    @property
    def training(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / _TRAINING

    @property
    def rounds(self) -> Path:
        """Where finished rounds are kept."""
        return self.folder / _ROUNDS

    @property
    def method(self) -> Path:
        """Where a method keeps its stages."""
        return self.folder / _METHOD

    @property
    def unfinished(self) -> bool:
        """Whether there is something to go on with."""
        begun = self.rounds.is_dir() and any(self.rounds.iterdir())
        if (self.cut / PLAN_FILE).exists() or begun or bool(Checkpoints(self.training).files()):
            return True
        return self.method.is_dir() and not any(line["step"] == "final" for line in self.lines())

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        there = all((self.folder / name).exists() for name in (PLAN_FILE, WEIGHTS_FILE))
        return there and not self.unfinished and any(line["step"] == "final" for line in self.lines())

    def lines(self) -> list[dict[str, Any]]:
        """The metrics; a last line that a kill cut off is left out."""
        file = self.folder / METRICS_FILE
        whole = []
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                whole.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return whole

    def has(self, step: str) -> bool:
        """Whether a step was done before the run was resumed."""
        return step in self._done

    def reopen(self, again: Collection[str]) -> None:
        """Go on with the run: the metrics lose the lines of the steps in ``again``, which are done once more."""
        kept = [line for line in self.lines() if line["step"] not in again]
        self._done = frozenset(str(line["step"]) for line in kept)
        if is_main():
            write_atomic(self.folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._begin -= max((float(line["elapsed"]) for line in kept), default=0.0)

    def close(self) -> None:
        """The result is written: what was only needed to go on is removed."""
        if is_main():
            shutil.rmtree(self.cut, ignore_errors=True)
            shutil.rmtree(self.rounds, ignore_errors=True)
            (self.training / METRICS_FILE).unlink(missing_ok=True)  # its lines are in the run's own
            Checkpoints(self.training).remove()

    def start(self, config: Mapping[str, Any]) -> None:
        """Clear an earlier run and write down every setting of this one."""
        if not is_main():
            return
        for folder in (self.cut, self.rounds, self.method, self.training):
            shutil.rmtree(folder, ignore_errors=True)
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomic(self.folder / CONFIG_FILE, text.encode())

    def log(self, step: str, **figures: Any) -> None:
        """Append one line to the metrics: the step, the seconds since the start, and its figures."""
        if not is_main():
            return
        line = {"step": step, "elapsed": round(time.monotonic() - self._begin, 3), **figures}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
