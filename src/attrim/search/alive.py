"""Who evaluates a trial, and whether that process is still there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Beats", "Process"]


@dataclass(frozen=True, slots=True)
class Process:
    """A process, named so that no other one is taken for it.

    Attributes:
        machine: the running system and its space of process numbers.
        pid: its number there.
        started: when the system started it, in the system's own ticks; empty where that is not known.
    """

    machine: str
    pid: int
    started: str

    @classmethod
    def me(cls) -> Process:
        """The present process."""
        return cls(_machine(), os.getpid(), _state(os.getpid())[1])

    @classmethod
    def read(cls, note: Any) -> Process | None:
        """What :meth:`note` gave; None for anything else."""
        if not isinstance(note, Mapping) or not {"machine", "pid", "started"} <= set(note):
            return None
        return cls(str(note["machine"]), int(note["pid"]), str(note["started"]))

    def note(self) -> dict[str, Any]:
        """Plain values."""
        return {"machine": self.machine, "pid": self.pid, "started": self.started}

    def is_gone(self) -> bool:
        """Whether it has certainly ended. False for a process of another machine, which cannot be seen from here."""
        if self.machine != _machine():
            return False
        state, started = _state(self.pid)
        return state in ("", "Z", "X") or started != self.started


class Beats:
    """Notices signs of life that stopped, by this process's own clock: machines need not agree on the time.

    Args:
        grace: seconds without a new beat after which a process counts as dead.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._seen: dict[Any, tuple[Any, float]] = {}

    def stopped(self, key: Any, beat: Any) -> bool:
        """Take note of the present beat of ``key``; whether it has not changed for too long."""
        now = time.monotonic()
        last, since = self._seen.get(key, (None, now))
        if key not in self._seen or last != beat:
            self._seen[key] = (beat, now)
            return False
        return now - since > self._grace


@cache
def _machine() -> str:
    """Processes with the same value share one table of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _state(pid: int) -> tuple[str, str]:
    """State letter and start of a process; ``("", "")`` if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ("", "") if Path("/proc/self/stat").exists() else (_answers(pid), "")
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def _answers(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "R"
