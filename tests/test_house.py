"""What the house holds itself to: short files and functions, raised errors instead of asserts, no prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "attrim"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_BYTES = 400, 80, 1_000_000

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    long = {f.name: n for f in functions(path) if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION}
    assert long == {}


@each_file
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert (ast.get_docstring(tree(path)) or "").strip() != ""


@each_file
def test_no_assert_no_print_no_bare_except(path: Path) -> None:
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"line {node.lineno}: print")
    assert found == []


@each_file
def test_no_pickle_on_the_way_in_or_out(path: Path) -> None:
    """Weights travel as safetensors; ``torch.load`` and ``torch.save`` would read and write pickles."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "pickle" for alias in node.names):
            found.append(f"line {node.lineno}: pickle")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_no_mutable_defaults() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{f.lineno} {f.name}"
        for path in FILES
        for f in functions(path)
        for default in (*f.args.defaults, *(d for d in f.args.kw_defaults if d is not None))
        if isinstance(default, ast.List | ast.Dict | ast.Set)
    ]
    assert found == []


def test_no_large_file_in_the_source_tree() -> None:
    rooms = ("src", "tests", "benchmarks", "docs")
    large = [p.name for r in rooms for p in (ROOT / r).rglob("*") if p.is_file() and p.stat().st_size > MAX_BYTES]
    assert large == []


def test_no_two_test_files_have_one_name() -> None:
    """Without packages pytest takes them for the same module, and then collects nothing at all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
