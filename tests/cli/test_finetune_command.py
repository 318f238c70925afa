"""`attrim finetune` and `--resume` from end to end, on a small network and a few images."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import attrim
from attrim.cli.models import build
from attrim.recover import evaluate, open_data
from attrim.ship import save_weights


@pytest.fixture
def pruned(call, net, images, tmp_path):
    """A folder of `attrim prune` without fine-tuning."""
    torch.manual_seed(0)
    save_weights(build(net).model, tmp_path / "w.safetensors")
    said = call(
        *("prune", net, "--weights", tmp_path / "w.safetensors", "--input", "1x3x8x8", "--keep-macs", "0.5"),
        *("--data", images, "--batch-size", "16", "--device", "cpu", "--no-flip", "--out", tmp_path / "cut"),
    )
    assert said.status == 0, said.err
    return tmp_path / "cut"


def lines(folder) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


QUICK = ("--epochs", "4", "--lr", "0.05", "--batch-size", "16", "--device", "cpu")


def test_a_run_folder_is_fine_tuned_with_its_original_as_teacher(call, net, pruned, images, tmp_path):
    out = tmp_path / "tuned"
    said = call("finetune", pruned, *QUICK, "--attention", "10", "--ema", "0.9", "--tensorboard", "--out", out)
    assert said.status == 0, said.err
    names = sorted(p.name for p in out.iterdir())
    assert names == ["config.yaml", "metrics.jsonl", "model.safetensors", "plan.json", "training"]
    assert [p.name for p in (out / "training").iterdir()] == ["tensorboard"]
    found = lines(out)
    assert [line["step"] for line in found] == ["start", "dense", "before", *["finetune"] * 4, "finetuned", "final"]
    epochs = found[3:7]
    assert {"loss", "loss_labels", "loss_distillation", "loss_attention", "holdout_accuracy"} <= set(epochs[0])
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert found[-2]["split"] == "holdout"
    assert found[-2]["accuracy"] == epochs[-1]["holdout_accuracy"]
    small = attrim.load(out, model=build(net).model)
    test = open_data(str(images), shape=(3, 8, 8)).batches("test")
    assert found[-1]["split"] == "test"
    assert found[-1]["accuracy"][2] == evaluate(small, test)
    assert found[-1]["params"][1] == sum(p.numel() for p in small.parameters())
    assert f"-> {found[-1]['accuracy'][2]:.2%} top-1 by fine-tuning (test split)" in said.out
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["model"], config["teacher"], config["data"], config["flip"]) == (net, "original", str(images), False)
    assert (config["epochs"], config["attention"], config["ema"], config["warmup"]) == (4, 10.0, 0.9, 0.05)
    again = call("finetune", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.status == 0, again.err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_result_can_be_fine_tuned_further_without_a_teacher(call, net, pruned, tmp_path):
    assert call("finetune", pruned, *QUICK, "--epochs", "1", "--out", tmp_path / "a").status == 0
    said = call("finetune", tmp_path / "a", *QUICK, "--epochs", "1", "--teacher", "none", "--out", tmp_path / "b")
    assert said.status == 0, said.err
    assert [line["step"] for line in lines(tmp_path / "b")] == ["start", "before", "finetune", "finetuned", "final"]
    assert "loss_distillation" not in lines(tmp_path / "b")[2]
    assert (tmp_path / "b" / "plan.json").read_bytes() == (pruned / "plan.json").read_bytes()


def test_any_model_is_trained_and_saved_whole(call, net, images, tmp_path):
    out = tmp_path / "whole"
    said = call("finetune", net, "--input", "1x3x8x8", "--data", images, *QUICK, "--epochs", "6", "--out", out)
    assert said.status == 0, said.err
    assert "the weights are random: training starts from nothing" in said.err
    final = lines(out)[-1]
    assert final["accuracy"][1] >= 0.9
    assert final["params"][0] == final["params"][1]
    whole = attrim.load(out, model=build(net).model)
    assert evaluate(whole, open_data(str(images), shape=(3, 8, 8)).batches("test")) == final["accuracy"][1]


class Killed(BaseException):
    """Not an error that anything catches: the process is gone."""


@pytest.fixture
def kill_after(monkeypatch):
    """Stop a run when its n-th batch of training is read."""
    from attrim.recover.feed import Feed

    genuine = Feed._portion

    def kill_after(count: int | None) -> None:
        left = [count]

        def portion(self, raw):
            if left[0] == 0:
                raise Killed
            left[0] = None if left[0] is None else left[0] - 1
            return genuine(self, raw)

        monkeypatch.setattr(Feed, "_portion", portion)

    return kill_after


def test_a_killed_run_goes_on_to_the_same_result(call, pruned, tmp_path, kill_after):
    arguments = ("finetune", pruned, *QUICK, "--mixup", "0.2")
    assert call(*arguments, "--out", tmp_path / "whole").status == 0
    kill_after(7)
    with pytest.raises(Killed):
        call(*arguments, "--out", tmp_path / "run")
    kill_after(None)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": "finetune", "ep')  # what a kill leaves
    said = call(*arguments, "--out", tmp_path / "run")
    assert said.status == 2
    assert "holds a run that was not finished. Pass --resume to go on with it, --overwrite to begin anew" in said.err
    said = call("finetune", "--resume", "--out", tmp_path / "run", "--lr", "0.1")
    assert said.status == 2
    assert "with --lr 0.05; found --lr 0.1. Leave it out, or start a new run in another folder." in said.err
    said = call("finetune", "--resume", "--out", tmp_path / "run")
    assert said.status == 0, said.err
    assert "going on with the run in" in said.err
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    steps = ["start", "dense", "before", *["finetune"] * 4, "finetuned", "final"]
    assert [line["step"] for line in lines(tmp_path / "run")] == steps
    assert [line.get("loss") for line in lines(tmp_path / "run")] == [
        line.get("loss") for line in lines(tmp_path / "whole")
    ]
    said = call("finetune", "--resume", "--out", tmp_path / "run")
    assert (said.status, said.out) == (0, f"the run in {tmp_path / 'run'} is finished\n")


@pytest.mark.parametrize("moment", [0, 2, 5])
def test_a_killed_prune_goes_on_to_the_same_result(call, net, images, tmp_path, kill_after, moment):
    torch.manual_seed(0)
    save_weights(build(net).model, tmp_path / "w.safetensors")
    arguments = (
        *("prune", net, "--weights", tmp_path / "w.safetensors", "--input", "1x3x8x8", "--keep-macs", "0.5"),
        *("--data", images, "--batch-size", "16", "--device", "cpu", "--method", "random", "--finetune-epochs", "2"),
    )
    assert call(*arguments, "--out", tmp_path / "whole").status == 0
    kill_after(moment)
    with pytest.raises(Killed):
        call(*arguments, "--out", tmp_path / "run", "--resume")  # nothing to go on with yet: it begins
    kill_after(None)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["config.yaml", "cut", "metrics.jsonl", *(["training"] if moment > 3 else [])]
    small = attrim.load(tmp_path / "run" / "cut", model=build(net).model)
    assert sum(p.numel() for p in small.parameters()) < 858
    assert "holds a run that was not finished" in call(*arguments, "--out", tmp_path / "run").err
    said = call("prune", "--resume", "--out", tmp_path / "run")
    assert said.status == 0, said.err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, resumed = (lines(tmp_path / name) for name in ("whole", "run"))
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    assert resumed[-1]["accuracy"] == whole[-1]["accuracy"]
    assert [line["elapsed"] for line in resumed] == sorted(line["elapsed"] for line in resumed)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "missing a run folder, or a MODEL such as timm:resnet18"),
        (["RUN"], "missing --out DIR"),
        (["RUN", "--out", "o", "--epochs", "0"], "epochs: expected an int >= 1, found 0"),
        (["RUN", "--out", "o", "--every-minutes", "0"], r"every_minutes: expected minutes > 0, or None, found 0.0"),
        (["RUN", "--out", "o", "--attention", "-1"], "attention: expected a weight >= 0, found -1.0"),
        (["RUN", "--out", "o", "--precision", "int8"], "'precision': input should be 'no', 'bf16' or 'fp16'"),
        (["RUN", "--out", "o", "--teacher", "me"], "'teacher': input should be 'original' or 'none'"),
        (["RUN", "--out", "RUN", "--overwrite"], "is the run to start from. Choose another folder for the result."),
        (["RUN", "--out", "o", "--input", "1x3x8x8"], "--input is for a MODEL; "),
        (["RUN", "--out", "o", "--teacher", "none", "--attention", "1"], "--attention compares with a teacher"),
        (["NET", "--out", "o", "--input", "1x3x8x8"], "fine-tuning needs images to train on. Add --data PATH."),
        (["NET", "--out", "o", "--teacher", "original"], "is not a run folder of attrim prune. Use --teacher none."),
        (["EMPTY", "--out", "o"], "has no config.yaml and no plan.json: expected a folder that attrim prune"),
        (["--resume"], "--resume goes on with the run in --out DIR, and that is missing."),
        (["--resume", "--out", "o", "--config", "c"], "--resume takes the settings of the run itself."),
        (["--resume", "--out", "o"], "missing a run folder, or a MODEL such as timm:resnet18"),
    ],
)
def test_wrong_usage(call, net, pruned, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = {"RUN": pruned, "NET": net, "EMPTY": tmp_path / "empty"}
    said = call("finetune", *(names.get(a, a) for a in arguments))
    assert said.status == 2
    assert text in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert (pruned / "plan.json").exists()


def test_only_the_main_process_speaks_and_writes(call, pruned, tmp_path, monkeypatch):
    from attrim.cli.runs import Run
    from attrim.cli.screen import is_main, note, say

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_main()
    run = Run(tmp_path / "run")
    run.start({"model": "m"})
    run.log("start")
    run.reopen(again=())
    run.close()
    say("one")
    note("two")
    assert not (tmp_path / "run").exists()
    Run(pruned)  # the main process is the one to refuse it
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_main()
