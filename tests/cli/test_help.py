"""Help: every command has an example, and no arguments shows the list."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from attrim.cli.app import app


def test_no_arguments_shows_the_commands(call):
    said = call()
    assert said.err == ""
    for command in ("demo", "trace", "prune", "search", "finetune", "evaluate", "methods"):
        assert command in said.out


@pytest.mark.parametrize("command", ["demo", "trace", "prune", "search", "finetune", "evaluate", "methods"])
def test_every_command_has_examples(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert f" attrim {command}" in result.output
    assert "Example" in result.output
    assert "--debug" in result.output


def test_methods_lists_every_criterion(call):
    from attrim.score import CRITERIA

    said = call("methods")
    assert said.status == 0
    for name, criterion in CRITERIA.items():
        assert f" {name} " in said.out
        assert criterion.summary.split()[0] in said.out
