"""The long schedules in examples/configs: what `--config` makes of them, that every option is known, and that nothing is lost."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from attrim.cli.models import build
from attrim.cli.search_settings import SearchSettings
from attrim.cli.settings import PruneSettings
from attrim.core.budget import Budget
from attrim.methods.dcpa import DcpaOptions
from attrim.methods.globalpru.options import GlobalPruOptions
from attrim.methods.pcas import PcasOptions
from attrim.methods.table import METHODS
from attrim.recover.recipe import Recipe
from attrim.score import CRITERIA

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "configs"
OPTIONS = {"dcpa": DcpaOptions, "globalpru": GlobalPruOptions, "pcas": PcasOptions}
KINDS = {**dict.fromkeys(OPTIONS, PruneSettings), "search": SearchSettings}


def file_of(name: str) -> Path:
    return FOLDER / f"{name}-resnet56-cifar10.yaml"


def read(name: str) -> dict:
    return yaml.safe_load(file_of(name).read_text())


def test_there_is_one_for_each():
    assert sorted(FOLDER.iterdir()) == sorted(file_of(name) for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_command_takes_the_file_and_writes_the_same_back(call, monkeypatch, tmp_path, name):
    command = "search" if name == "search" else "prune"
    where = "attrim.cli.search.run_search" if name == "search" else "attrim.cli.prune.run_prune"
    seen = []
    monkeypatch.setattr(where, lambda settings, resume: seen.append(settings))
    assert call(command, "--config", file_of(name)).status == 0
    settings = seen[-1]
    assert type(settings) is KINDS[name]
    given = read(name)
    said = settings.model_dump(mode="json")
    assert {key: value for key, value in said.items() if key in given and key != "option"} == {
        key: value for key, value in given.items() if key != "option"
    }
    assert given["option"].items() <= said["option"].items()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said))
    assert call(command, "--config", tmp_path / "config.yaml").status == 0
    assert seen[-1].model_dump(mode="json") == said
    assert call(command, "--config", file_of(name), "--keep-macs", "0.3", "--out", "elsewhere").status == 0
    assert (seen[-1].keep_macs, seen[-1].out) == (0.3, "elsewhere")


@pytest.mark.parametrize("name", KINDS)
def test_budget_network_and_training_are_in_their_ranges(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    settings = KINDS[name].model_validate(read(name))
    budget = settings.budget()
    assert isinstance(budget, Budget)
    assert budget.macs == 0.5
    assert type(build(settings.model).model).__name__ == "CifarResNet"
    Recipe(epochs=settings.finetune_epochs, lr=settings.lr, optimizer=settings.optimizer).check(None)
    assert settings.out == f"runs/{name}-resnet56"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_method_knows_every_option(name):
    option = read(name)["option"]
    assert set(option) <= set(METHODS[name].options)
    known = {field.name for field in fields(OPTIONS[name])}
    values = {key: value for key, value in {**METHODS[name].options, **option}.items() if key in known}
    OPTIONS[name](**values).check()
    for epochs, lr in (("epochs", "lr"), ("warmup_epochs", "warmup_lr")):
        if epochs in option:
            Recipe(epochs=option[epochs], lr=option[lr], precision=option.get("precision", "no")).check(None)


def test_the_criterion_of_the_search_knows_every_option():
    settings = read("search")
    known = inspect.signature(CRITERIA[settings["criterion"]].function).parameters
    assert set(settings["option"]) <= set(known)


def test_the_long_schedules_are_long():
    dcpa, globalpru, pcas, search = (read(name) for name in KINDS)
    assert (dcpa["option"]["epochs"], dcpa["finetune_epochs"], dcpa["option"]["precision"]) == (600, 300, "bf16")
    assert dcpa["distill"] is True
    assert (globalpru["option"]["epochs"], globalpru["finetune_epochs"]) == (100, 160)
    assert (pcas["option"]["epochs"], pcas["finetune_epochs"]) == (10, 160)
    assert (search["evaluations"], search["finetune_epochs"]) == (300, 160)
