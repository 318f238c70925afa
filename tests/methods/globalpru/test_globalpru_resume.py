"""A run that is killed anywhere goes on to the same bytes; a folder of another run is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from some import batches

import attrim
from attrim.errors import CheckpointError
from attrim.methods.globalpru import globalpru
from attrim.methods.globalpru.diary import Diary
from attrim.methods.outcome import MethodOutcome
from nets import Plain, filled

OPTIONS: dict[str, Any] = {
    "ratio": 0.5, "warmup_epochs": 2, "epochs": 4, "revote_every": 1, "lr": 0.1, "warmup_lr": 0.1, "seed": 3,
}  # fmt: skip


class Killed(Exception):
    pass


def run(folder: Path | None, data: Any = None, **more: Any) -> MethodOutcome:
    model, data = filled(Plain(20, 150)), batches() if data is None else data  # above 128 channels pairs are drawn
    channels = attrim.trace(model, torch.zeros(2, 3, 8, 8))
    return globalpru(model, channels, data, holdout=data, folder=folder, **{**OPTIONS, **more})


Kill = Callable[[pytest.MonkeyPatch], dict[str, Any]]


def at_epoch(epoch: int) -> Kill:
    """Stops when that epoch is reported."""

    def told(report: Mapping[str, Any]) -> None:
        if report["epoch"] == epoch:
            raise Killed

    return lambda _: {"on_epoch": told}


def at_call(name: str, count: int) -> Kill:
    """Stops at the n-th call of a function."""

    def patch(patched: pytest.MonkeyPatch) -> dict[str, Any]:
        module, _, attribute = name.rpartition(".")
        original, calls = getattr(importlib.import_module(module), attribute), []

        def called(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == count:
                raise Killed
            return original(*args, **options)

        patched.setattr(name, called)
        return {}

    return patch


def same(one: MethodOutcome, two: MethodOutcome) -> None:
    first, second = one.model_to_cut.state_dict(), two.model_to_cut.state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert one.plan.to_json() == two.plan.to_json()
    for what in ("orders", "kept"):
        for group, value in one.statistics[what].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two.statistics[what][group]))
    assert timeless(one) == timeless(two)


def timeless(outcome: MethodOutcome) -> list[dict[str, Any]]:
    slow = ("seconds", "images_per_second")
    return [{k: v for k, v in entry.items() if k not in slow} for entry in outcome.statistics["epochs"]]


@pytest.fixture(scope="module")
def whole() -> MethodOutcome:
    return run(None)


HERE = "attrim.methods.globalpru"
PLACES: dict[str, Kill] = {
    "warm-up": at_epoch(1),
    "end of the warm-up": at_epoch(2),
    "vote": at_call(f"{HERE}.ballots.read_attention", 1),
    "masks": at_call(f"{HERE}.run.measure_masks", 1),
    "sparse training": at_epoch(3),
    "second vote": at_call(f"{HERE}.ballots.collect_votes", 2),
    "last epochs": at_epoch(5),
    "reading": at_call("attrim.methods.gate_training.read_attention", 1),
}


@pytest.mark.parametrize("where", PLACES)
def test_it_goes_on_to_the_same_bytes(where: str, whole: MethodOutcome, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        more = PLACES[where](patched)
        with pytest.raises(Killed):
            run(tmp_path / "run", **more)
    torch.manual_seed(99)
    told: list[int] = []
    resumed = run(tmp_path / "run", resume=True, on_epoch=lambda report: told.append(report["epoch"]))
    same(whole, resumed)
    assert told == [1, 2, 3, 4, 5, 6]  # also those of the part before, so that a log of epochs is whole
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


@pytest.mark.parametrize("where", ["sparse training", "second vote", "reading"])
def test_a_shuffling_source_gives_the_same_votes_again(where: str, tmp_path: Path) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 4, shuffle=True)
    given: dict[str, Any] = {"data": loader, "samples": 5, "monitor": 5}
    torch.manual_seed(1)
    whole = run(None, **given)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        run(tmp_path, **given, **PLACES[where](patched))
    torch.manual_seed(2)
    same(whole, run(tmp_path, resume=True, **given))


def test_a_finished_run_is_read_and_another_refused(
    whole: MethodOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match="resume=True"):
        run(tmp_path)
    with pytest.raises(CheckpointError, match=r"omega=4\.0, found omega=2\.0"):
        run(tmp_path, resume=True, omega=2.0)
    for name in ("run.finetune", "ballots.collect_votes", "run.measure_agreement"):
        monkeypatch.setattr(f"{HERE}.{name}", None)
    same(whole, run(tmp_path, resume=True))
    dropped = run(tmp_path, resume=True, end="drop", monitor=3)  # neither changes what was trained
    assert torch.equal(dropped.model_to_cut.conv1.weight, whole.statistics["network"].conv1.weight)
    names = {p.name for p in tmp_path.glob("*.safetensors")}
    assert names == {
        f"{n}.safetensors"
        for n in ("warm-up", "vote-0", "vote-1", "vote-2", "sparse-0", "sparse-1", "sparse-2", "attention")
    }


def test_a_damaged_diary_is_named(tmp_path: Path) -> None:
    path = tmp_path / "epochs.json"
    diary = Diary(path)
    assert diary.once("a", lambda: {"stage": "x", "loss": 1.0}) == {"stage": "x", "loss": 1.0}
    assert diary.once("a", lambda: {"stage": "x", "loss": 2.0})["loss"] == 1.0
    assert Diary(path).of_stage("x") == [{"stage": "x", "loss": 1.0}]
    path.write_text("{")
    with pytest.raises(CheckpointError, match="only figures are lost"):
        Diary(path)
