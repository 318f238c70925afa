"""Checkpoints of a training run: nested values in one safetensors file, whole or not at all, the newest two kept."""

from __future__ import annotations

import json
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from attrim.core.plan import write_atomic
from attrim.errors import AttrimWarning, CheckpointError

__all__ = ["KEPT", "Checkpoints", "pack", "unpack"]

KEPT = 2
"""Checkpoints that stay on disk: the last good one and the one before."""

VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


class Checkpoints:
    """The checkpoints of one run in one folder, named by the number of batches that were done.

    A file is written beside its place, flushed to the disk and renamed, so a kill or a full disk at any moment leaves
    the older ones whole. Values may be nested dicts, lists and tuples of tensors, NumPy arrays, numbers, texts and None;
    no pickle is involved.

    Args:
        folder: where they lie; made at the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def files(self) -> list[Path]:
        """The checkpoint files, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)

    def write(self, done: int, values: Mapping[str, Any]) -> Path:
        """Store ``values`` after ``done`` batches, and remove all but the newest two files.

        Raises:
            CheckpointError: the file cannot be written (no space, no permission). The older ones are untouched.
        """
        path = self.folder / f"checkpoint-{done:09d}.safetensors"
        tensors, text = pack(dict(values))
        notes = {"attrim": str(VERSION), "values": text, "digest": _digest(tensors, text)}
        try:
            write_atomic(path, serialise(tensors, notes))
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint '{path}': {error.strerror or error}. {self._last()} Make room or correct "
                "the permissions, then continue with resume=True (attrim: --resume)."
            ) from error
        for old in self.files()[KEPT:]:
            old.unlink(missing_ok=True)
        self._sweep()
        return path

    def read(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that can be read, and its file; None where there is none.

        A damaged file is passed over with an :class:`AttrimWarning`.

        Raises:
            CheckpointError: the newest one was written by a newer attrim.
        """
        for path in self.files():
            try:
                return _read(path), path
            except _Damaged as error:
                warnings.warn(
                    f"the checkpoint '{path}' is damaged ({error}); going back to the one before.",
                    AttrimWarning,
                    stacklevel=2,
                )
        return None

    def remove(self) -> None:
        """Delete all checkpoints, and the folder if nothing else is in it."""
        for path in self.files():
            path.unlink(missing_ok=True)
        self._sweep()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _sweep(self) -> None:
        """What killed writers left: temporary files that never became checkpoints."""
        if self.folder.is_dir():
            for path in self.folder.glob(".checkpoint-*"):
                path.unlink(missing_ok=True)

    def _last(self) -> str:
        found = self.files()
        return f"The last good one is '{found[0].name}'." if found else "There is none yet."


class _Damaged(Exception):
    """A file is not a whole checkpoint."""


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            notes = dict(handle.metadata() or {})
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise _Damaged(str(error)) from error
    if not notes.get("attrim", "").isdigit() or "values" not in notes:
        raise _Damaged("it holds no training state")
    if int(notes["attrim"]) > VERSION:
        raise CheckpointError(
            f"the checkpoint '{path}' has version {notes['attrim']}, this attrim reads up to {VERSION}. Update with: "
            "pip install -U attrim"
        )
    if notes.get("digest") != _digest(tensors, notes["values"]):
        raise _Damaged("its content does not match its digest")
    values: dict[str, Any] = unpack(tensors, notes["values"])
    return values


def pack(values: Any) -> tuple[dict[str, Tensor], str]:
    """Nested values as named CPU tensors and one text; see :func:`unpack`.

    Raises:
        CheckpointError: a value of another kind (it is named).

    Example:
        >>> pack({"step": 3, "weight": torch.zeros(2)})
        ({'0': tensor([0., 0.])}, '{"d": [["step", 3], ["weight", {"t": "0"}]]}')
    """
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_encode(values, tensors, ""))


def unpack(tensors: Mapping[str, Tensor], text: str) -> Any:
    """The values that :func:`pack` took apart, bit by bit, keys and kinds of container included."""
    return _decode(json.loads(text), tensors)


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
        # a copy of its own memory: safetensors refuses tensors that overlap
        tensors[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"n" if isinstance(value, np.ndarray) else "t": name}
    if isinstance(value, Mapping):
        return {"d": [[_encode(k, tensors, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = list(value)
        if all(type(item) is int for item in items):
            return {"i" if isinstance(value, list) else "j": items}
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(items)]}
    raise CheckpointError(
        f"a checkpoint cannot hold '{where.lstrip('.')}', a {type(value).__name__}. Expected tensors, arrays, numbers, "
        "texts, lists, tuples and dicts."
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "t":
        return tensors[content]
    if kind == "n":
        return tensors[content].numpy()
    if kind == "d":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind in "ij":
        return content if kind == "i" else tuple(content)
    items = [_decode(item, tensors) for item in content]
    return items if kind == "l" else tuple(items)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    total = zlib.crc32(text.encode())
    for name in sorted(tensors, key=int):
        flat = tensors[name].reshape(-1).view(torch.uint8) if tensors[name].numel() else torch.empty(0)
        total = zlib.crc32(flat.numpy().data, total)
    return f"{total:08x}"
