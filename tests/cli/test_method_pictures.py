"""Pictures of what a method did: left in its run, drawn again by `attrim report`, and never a reason to fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from attrim.cli.method_pictures import PICTURES, method_pictures
from attrim.core.plan import PruningPlan
from attrim.methods.attention import AttentionStatistics
from attrim.methods.globalpru import history

OPTIONS = {
    "dcpa": ("epochs=4", "warmup=0", "policy_lr=0.1"),
    "globalpru": ("warmup_epochs=1", "epochs=2"),
    "pcas": ("epochs=1",),
}


@pytest.fixture
def run(call, net, images, tmp_path):
    """Prune by a method; gives the folder."""

    def run(method: str, *more: object, name: str = "run") -> Path:
        options = [text for option in OPTIONS.get(method, ()) for text in ("--option", option)]
        said = call(
            *("prune", net, "--input", "1x3x8x8", "--data", images, "--batch-size", "16", "--device", "cpu"),
            *("--method", method, "--keep-macs", "0.5", "--recover", "none", *options, *more, "--out", tmp_path / name),
        )
        assert said.status == 0, said.err
        return tmp_path / name

    return run


def words(file: Path) -> set[str]:
    return {node.text or "" for node in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")}


def svgs(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.svg")}


def lines(folder: Path, step: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["step"] == step]


def figure(folder: Path, name: str):
    """The figure as numbers, of the same data as the file."""
    pictures = method_pictures(folder, PruningPlan.load(folder / "plan.json"))
    assert set(pictures) <= set(PICTURES)
    picture = pictures[name]()
    assert picture.svg == (folder / name).read_text()
    return picture.figure


def test_dcpa_leaves_policy_costs_and_attention_and_report_draws_them_again(call, run):
    pytest.importorskip("matplotlib")
    out = run("dcpa")
    drawn = svgs(out)
    assert set(drawn) == {"architecture.svg", "policy.svg", "costs-macs.svg", "attention.svg"}
    assert {"epoch 1", "epoch 2", "epoch 3", "epoch 4", "conv1", "conv2", "12.5 %", "100 %"} <= words(
        out / "policy.svg"
    )
    assert {"target, 50%", "likeliest network", "temperature (right)"} <= words(out / "costs-macs.svg")
    assert {"conv1  (8)", "conv2  (8)", "strongest"} <= words(out / "attention.svg")
    reports = lines(out, "search")
    curves = [line.get_ydata() for line in figure(out, "costs-macs.svg").axes[0].lines]
    assert np.allclose(curves[0], [report["expected"]["macs"] for report in reports])
    assert np.allclose(curves[1], [report["likeliest"]["macs"] for report in reports])
    last = figure(out, "policy.svg").axes[3].images[0].get_array()
    assert np.allclose(last, list(reports[-1]["probabilities"].values()))
    for name in drawn:
        (out / name).unlink()
    said = call("report", out)
    assert said.status == 0, said.err
    assert svgs(out) == drawn
    assert [Path(line).name for line in said.out.replace("\n", "").split("wrote ")[1:]] == [
        *("architecture.svg", "policy.svg", "costs-macs.svg", "attention.svg")
    ]
    assert call("report", out, "--out", out / "other.svg").out.count("wrote") == 1


def test_attention_across_layers_is_a_square_and_another_method_clears_it_away(run):
    pytest.importorskip("matplotlib")
    out = run("dcpa", "--option", "kind=xattn")
    square = np.array(figure(out, "attention.svg").axes[0].images[0].get_array())
    assert square.shape == (2, 2)
    assert square.sum(1) == pytest.approx([1, 1], abs=2e-4)
    assert square.tolist() == lines(out, "derived")[0]["layers"]
    run("l2", "--overwrite")
    assert set(svgs(out)) == {"architecture.svg"}


def test_a_free_policy_has_no_attention_to_draw(run):
    pytest.importorskip("matplotlib")
    assert set(svgs(run("dcpa", "--option", "kind=free"))) == {"architecture.svg", "policy.svg", "costs-macs.svg"}


def test_pcas_leaves_histograms_cut_where_the_plan_cuts(run):
    pytest.importorskip("matplotlib")
    out = run("pcas")
    assert set(svgs(out)) == {"architecture.svg", "attention.svg"}
    picture = figure(out, "attention.svg")
    (line,) = picture.axes[0].lines
    threshold = line.get_xdata()[0]
    scores = AttentionStatistics.load(out / "method" / "attention.safetensors").score()
    groups = PruningPlan.load(out / "plan.json").groups
    assert set(scores) == {"conv1", "conv2"}
    assert sum(entry["kept"] for entry in groups.values()) < 16
    for group, row in scores.items():
        kept = int((row >= threshold).sum())
        assert groups[group]["kept"] == max(kept, 1)  # a tenth of 8 channels is the floor
    assert [axes.get_title() or axes.get_title("left") for axes in picture.axes] == ["conv1  (8)", "conv2  (8)"]


def test_widths_that_are_rounded_have_no_single_threshold(run):
    pytest.importorskip("matplotlib")
    out = run("pcas", "--multiple-of", "2")
    assert not figure(out, "attention.svg").axes[0].lines


def test_globalpru_leaves_its_agreement(run):
    pytest.importorskip("matplotlib")
    out = run("globalpru")
    assert set(svgs(out)) == {"architecture.svg", "agreement.svg"}
    diary = history(list(json.loads((out / "method" / "epochs.json").read_text()).values()))
    assert diary.epochs == (1, 2, 3)
    left, right = figure(out, "agreement.svg").axes[:2]
    for axes, values in ((left, diary.tau), (right, diary.overlap)):
        assert [list(line.get_ydata()) for line in axes.lines[:-1]] == [list(row) for row in values.values()]
        assert list(axes.lines[0].get_xdata()) == [1, 2, 3]


def test_a_search_leaves_its_curve_and_its_ratios(call, net, images, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("optuna")
    out = tmp_path / "run"
    said = call(
        *("search", net, "--input", "1x3x8x8", "--data", images, "--batch-size", "16", "--device", "cpu", "--out", out),
        *("--keep-macs", "0.4", "--criterion", "l2", "--recover", "none", "--evaluations", "4"),
    )
    assert said.status == 0, said.err
    assert set(svgs(out)) == {"architecture.svg", "search.svg", "ratios.svg"}
    best = [line["best"] for line in lines(out, "trial")]
    curve = figure(out, "search.svg").axes[0].lines[0].get_ydata()
    assert curve[0] == best[0]
    assert curve[-1] == best[-1] == lines(out, "searched")[0]["value"]
    assert {"first candidate", "found", "keep ratio", "conv1"} <= words(out / "ratios.svg")
    groups = PruningPlan.load(out / "plan.json").groups
    heights = {line.get_label(): line for line in figure(out, "ratios.svg").axes[0].containers if line.get_label()}
    ratios = heights["found"].lines[0].get_ydata()
    assert ratios.tolist() == [groups[group]["kept"] / 8 for group in ("conv1", "conv2")]


def test_without_matplotlib_a_run_is_as_good(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = run("dcpa")
    assert not svgs(out)
    assert lines(out, "final")


def test_figures_that_cannot_be_read_are_named_and_left_out(call, run):
    pytest.importorskip("matplotlib")
    out = run("pcas")
    (out / "method" / "attention.safetensors").write_bytes(b"damaged")
    (out / "architecture.svg").unlink()
    said = call("report", out)
    assert said.status == 0
    assert said.out.count("wrote") == 1
    assert (out / "architecture.svg").is_file()
    assert "attention.svg is not drawn" in said.err.replace("\n", " ")


def test_rounds_and_folders_that_are_no_run_have_none(run, tmp_path):
    out = run("l2", "--rounds", "2")
    plan = PruningPlan.load(out / "plan.json")
    assert method_pictures(out, plan) == {}
    assert method_pictures(tmp_path / "nowhere", plan) == {}
