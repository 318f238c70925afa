"""Defaults, then the config file, then what was typed; and the run folder that keeps them."""

from __future__ import annotations

import json

import pytest
import yaml

from attrim.cli.runs import Run
from attrim.cli.settings import PruneSettings, parse_options
from attrim.errors import InputError


@pytest.fixture
def settled(call, monkeypatch, tmp_path):
    """What `attrim prune` would run with."""
    seen: list[PruneSettings] = []
    monkeypatch.setattr("attrim.cli.prune.run_prune", lambda settings, resume: seen.append(settings))

    def settled(*arguments: object, config: dict[str, object] | None = None) -> PruneSettings:
        extra: list[object] = []
        if config is not None:
            (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
            extra = ["--config", tmp_path / "c.yaml"]
        said = call("prune", *arguments, *extra)
        assert said.status == 0, said.err
        return seen[-1]

    return settled


def test_defaults(settled):
    settings = settled("timm:resnet18", "--out", "o", "--keep-macs", "0.5")
    assert settings == PruneSettings(model="timm:resnet18", out="o", keep_macs=0.5)
    budget = settings.budget()
    assert (budget.macs, budget.params, budget.min_keep, budget.scope) == (0.5, None, 0.1, "global")


def test_all_that_is_typed_arrives(settled):
    settings = settled(
        *("m.py:f", "--out", "o", "--method", "taylor", "--keep-params", "0.4", "--keep-channels", "0.6"),
        *("--min-keep", "4", "--multiple-of", "8", "--max-removed", "0.7", "--frozen", "a.*", "--frozen", "b:0"),
        *("--scope", "isomorphic", "--option", "reduction=max", "--option", "power=1", "--data", "d", "--limit", "10"),
        *(
            "--mean",
            "0.5,0.4,0.3",
            "--std",
            "1",
            "--no-flip",
            "--recover",
            "recalibrate",
            "--finetune-epochs",
            "2",
            "--lr",
            "0.1",
        ),
        *("--no-distill", "--seed", "7", "--batch-size", "32", "--input", "1x3x8x8", "--num-classes", "3"),
    )
    assert settings.budget().min_keep == 4
    assert isinstance(settings.min_keep, int)
    assert settings.budget().frozen == ("a.*", "b:0")
    assert settings.option == {"reduction": "max", "power": 1}
    assert settings.mean == (0.5, 0.4, 0.3)
    assert (settings.flip, settings.recover, settings.distill) == (False, "recalibrate", False)
    assert (settings.seed, settings.batch_size, settings.limit, settings.num_classes) == (7, 32, 10, 3)


def test_typed_wins_over_the_file_and_the_file_over_defaults(settled):
    config = {"model": "m.py:f", "keep_macs": 0.3, "batch-size": 16, "frozen": ["x.*"], "min_keep": 3}
    settings = settled("--out", "o", "--keep-macs", "0.5", config=config)
    assert (settings.model, settings.keep_macs, settings.batch_size) == ("m.py:f", 0.5, 16)
    assert settings.frozen == ("x.*",)
    assert settings.min_keep == 3
    assert settled("--out", "o", "--batch-size", "128", config=config).batch_size == 128  # typed, though the default


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("keep_mac: 0.5", "'keep_mac' is no option of attrim prune"),
        ("lr: fast", "'lr': input should be a valid number, unable to parse string as a number, found 'fast'"),
        ("- a", "expected 'name: value' lines in"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files(call, tmp_path, text, complaint):
    (tmp_path / "c.yaml").write_text(text)
    said = call("prune", "m.py:f", "--out", "o", "--keep-macs", "0.5", "--config", tmp_path / "c.yaml")
    assert said.status == 2
    assert complaint in said.err
    said = call("prune", "--config", tmp_path / "none.yaml")
    assert "--config: cannot read" in said.err


def test_options_are_yaml():
    assert parse_options(["a=1", "b=true", "c=x=y", "d=0.5"]) == {"a": 1, "b": True, "c": "x=y", "d": 0.5}


def test_a_run_appends_lines_and_guards_results(tmp_path):
    run = Run(tmp_path / "r")
    assert not (tmp_path / "r").exists()
    run.start({"model": "m", "mean": [0.5]})
    run.log("dense", accuracy=0.5)
    run.log("cut", macs=[2, 1])
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ["dense", "cut"]
    assert lines[1]["macs"] == [2, 1]
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text()) == {"model": "m", "mean": [0.5]}
    Run(tmp_path / "r").start({})  # it left no result
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
    (tmp_path / "r" / "plan.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"already holds a run \(plan\.json\)\. Choose another folder, or pass --overwrite"
    ):
        Run(tmp_path / "r")
    Run(tmp_path / "r", overwrite=True).start({})
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["config.yaml"]
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        Run(tmp_path / "f")
