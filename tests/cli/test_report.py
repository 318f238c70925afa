"""``attrim report`` and the picture that ``attrim prune`` leaves in its run."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture
def runs(call, net: str, tmp_path: Path) -> list[Path]:
    found = []
    for keep in ("0.5", "0.8"):
        out = tmp_path / f"keep{keep}"
        assert call("prune", net, "--input", "1x3x16x16", "--keep-macs", keep, "--out", out).status == 0
        found.append(out)
    return found


def words(file: Path) -> list[str]:
    return [node.text or "" for node in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def test_a_run_has_a_picture_and_report_draws_it_again(call, runs):
    file = runs[0] / "architecture.svg"
    drawn = file.read_bytes()
    assert {"conv1", "conv2", "kept", "removed"} <= set(words(file))
    file.unlink()
    said = call("report", runs[0])
    assert said.status == 0
    assert said.out.replace("\n", "") == f"wrote {file}"
    assert file.read_bytes() == drawn


def test_runs_are_compared(call, runs, tmp_path):
    said = call("report", *runs, "--out", tmp_path / "both.svg")
    assert said.status == 0
    titles = [text for text in words(tmp_path / "both.svg") if "of the MACs" in text]
    assert [title.split(":")[0] for title in titles] == ["keep0.5", "keep0.8"]


def test_what_is_no_run(call, tmp_path):
    said = call("report", tmp_path / "nowhere")
    assert said.status == 2
    assert "neither a run" in said.err.replace("\n", " ")


def test_another_ending(call, runs):
    said = call("report", runs[0], "--out", "picture.pdf")
    assert said.status == 2
    assert ".svg or .png" in said.err.replace("\n", " ")


def test_help_has_examples(call):
    said = call("report", "--help")
    assert " attrim report runs/half" in said.out
    assert "Example" in said.out
