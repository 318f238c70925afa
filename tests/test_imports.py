"""Imports run one way: errors <- core <- modules <- first ring <- second ring <- cli. Read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "attrim"

RINGS = (
    ("errors",),
    ("core",),
    ("modules",),
    ("trace", "score", "search", "surgery"),
    ("methods", "recover", "ship", "report"),
    ("cli",),
)
RING = {room: number for number, rooms in enumerate(RINGS) for room in rooms}
FIRST_RING = RINGS[3]
OPTIONAL = (
    "timm", "torchvision", "datasets", "PIL", "typer", "rich", "yaml", "pydantic", "sklearn", "optuna", "accelerate",
    "onnx", "onnxruntime", "jinja2",
)  # fmt: skip


def room_of(path: Path) -> str:
    """The room a source file lives in; "" for the package's own ``__init__`` and ``__main__``."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else "" if path.stem.startswith("__") else path.stem


def imported_rooms(path: Path) -> set[tuple[str, int]]:
    """``(room, line)`` of every attrim import of a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ("attrim", *path.relative_to(SOURCE).parts[:-1])
                base = ".".join(package[: len(package) - node.level + 1])
                names = [f"{base}.{node.module}"] if node.module else [f"{base}.{alias.name}" for alias in node.names]
            elif node.module == "attrim":
                names = [f"attrim.{alias.name}" for alias in node.names]
            else:
                names = [node.module or ""]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "attrim":
                found.add((rest.split(".")[0], node.lineno))
    return found


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_room_is_in_the_picture() -> None:
    rooms = {room_of(path) for path in FILES} - {""}
    assert rooms == set(RING)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    mine = room_of(path)
    ring = RING.get(mine, len(RINGS))
    wrong = []
    for room, line in sorted(imported_rooms(path)):
        if mine and room not in RING:
            wrong.append(f"line {line}: imports the package itself or the unknown room '{room}'")
        elif room in RING and (RING[room] > ring or (mine in FIRST_RING and room in FIRST_RING and room != mine)):
            wrong.append(f"line {line}: '{mine}' imports '{room}'")
    assert wrong == []


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    uses: dict[str, set[str]] = {room: set() for room in RING}
    for path in FILES:
        if room_of(path):
            uses[room_of(path)] |= {room for room, _ in imported_rooms(path) if room in RING} - {room_of(path)}
    done: set[str] = set()
    while len(done) < len(uses):
        ready = {room for room in uses if room not in done and uses[room] <= done}
        assert ready, f"a circle among {sorted(set(uses) - done)}"
        done |= ready


def test_the_core_needs_no_extra() -> None:
    code = f"import attrim, sys; print(*[name for name in {OPTIONAL!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []
