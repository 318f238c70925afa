"""The public names are exactly the documented ones; each says what it does."""

from __future__ import annotations

import inspect
import re
import types
from importlib.metadata import version
from pathlib import Path

import pytest

import attrim

ROOT = Path(__file__).parents[1]

FLOW = {
    "trace",
    "score",
    "search",
    "allocate",
    "apply",
    "verify",
    "prune",
    "prune_rounds",
    "save",
    "load",
    "carry_optimizer",
    "plan_from_kept",
}
NOUNS = {
    "Axis", "Branch", "Budget", "ChannelGroup", "ChannelMap", "CostModel", "Member", "PinnedAxis", "PruneResult", "PruningPlan",
    "Scores", "SearchResult", "Tap", "Verification",
}  # fmt: skip
ERRORS = {"AttrimError", "AttrimWarning"}
ROOMS = {"errors", "recover"}
TABLES = {"REPAIRS"}
PUBLIC = FLOW | NOUNS | ERRORS | ROOMS | TABLES | {"__version__"}


def test_the_list_is_the_documented_one() -> None:
    assert set(attrim.__all__) == PUBLIC
    assert len(attrim.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_exists(name: str) -> None:
    assert getattr(attrim, name) is not None


@pytest.mark.parametrize("name", sorted(FLOW | NOUNS | ERRORS | ROOMS))
def test_every_name_says_what_it_does(name: str) -> None:
    assert len((inspect.getdoc(getattr(attrim, name)) or "").split()) >= 5


@pytest.mark.parametrize("name", sorted(FLOW))
def test_functions_show_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(attrim, name)) or "")


def test_nothing_else_is_left_lying_about() -> None:
    """Beside the list there are only subpackages: no helper, no module of another project."""
    stray = [
        name
        for name, value in vars(attrim).items()
        if not name.startswith("_")
        and name not in PUBLIC
        and name != "annotations"
        and not (isinstance(value, types.ModuleType) and value.__name__ == f"attrim.{name}")
    ]
    assert stray == []


def test_every_error_has_the_common_base() -> None:
    for name in attrim.errors.__all__:
        kind = getattr(attrim.errors, name)
        assert issubclass(kind, attrim.AttrimError) or kind is attrim.AttrimWarning


def test_the_version_is_stated_once() -> None:
    assert attrim.__version__ == version("attrim")
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert stated[1] == attrim.__version__


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_pages_name_only_what_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    used = set(re.findall(r"\battrim\.([A-Za-z_]+)\(", text))
    assert used <= PUBLIC
    assert {"trace", "prune"} <= used
