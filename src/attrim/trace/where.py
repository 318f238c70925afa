"""Where in the user's code an operator was called: module path and source line, from the Python stack."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import NamedTuple

import torch

__all__ = ["Lines", "call_site"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PLUMBING = tuple(
    _TORCH + part
    for part in ("_ops.py", "utils" + os.sep, "_subclasses" + os.sep, "_library" + os.sep, "_decomp" + os.sep,
                 "_refs" + os.sep, "_prims", "_meta_registrations.py", "overrides.py", "_compile.py", "_dynamo" + os.sep)
)  # fmt: skip


class Lines(NamedTuple):
    """The line that called the operator, and the innermost line outside torch (equal where there is none)."""

    inner: tuple[str, int]
    user: tuple[str, int]

    def __str__(self) -> str:
        path, line = self.user
        return f"{_short(path)}:{line}"


def call_site() -> Lines:
    """Walk the stack outwards from the dispatcher to the first line of torch's Python and the first line of the user."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    inner = ("", 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_HERE):
            break
        if not path.startswith(_TORCH):
            user = (path, frame.f_lineno)
            return Lines(inner if inner[0] else user, user)
        if not inner[0] and not path.startswith(_PLUMBING):
            inner = (path, frame.f_lineno)
        frame = frame.f_back
    return Lines(inner, inner)


def _short(path: str) -> str:
    """A path that a person recognises: from site-packages, from the working directory, or its last three parts."""
    for marker in ("site-packages" + os.sep, "dist-packages" + os.sep):
        if marker in path:
            return path.split(marker)[-1]
    cwd = os.getcwd() + os.sep
    return path[len(cwd) :] if path.startswith(cwd) else os.sep.join(path.split(os.sep)[-3:])
