"""A run that is killed and resumed ends bitwise where an undisturbed one ends; what cannot be continued is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attrim.errors import AttrimWarning, CheckpointError, InputError
from attrim.recover import finetune

ALWAYS = 1e-9
"""Minutes between checkpoints: one after every step."""


def images(count: int = 56, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, 4, generator=generator)
    return x, (x[:, 0].mean((1, 2)) > 0).long()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = images()
    return list(zip(x.split(8), y.split(8), strict=True))


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(24, 2)
    ).eval()


class Killed(Exception):
    pass


class Mortal:
    """Batches that stop the run when the n-th is asked for, counted over the whole run."""

    def __init__(self, inner, last: int | None) -> None:
        self.inner, self.left = inner, last

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __iter__(self):
        for batch in self.inner:
            if self.left == 0:
                raise Killed
            self.left = None if self.left is None else self.left - 1
            yield batch


class Augmented:
    """Draws from every global generator while it goes along, as user code does."""

    def __len__(self) -> int:
        return 7

    def __iter__(self):
        for x, y in batches():
            yield x + 0.1 * torch.randn(()) + 0.1 * np.random.rand() + 0.1 * random.random(), y  # noqa: NPY002


def shuffled(**options):
    return DataLoader(TensorDataset(*images()), batch_size=8, shuffle=True, **options)


SOURCES = {
    "list": batches,
    "augmented": Augmented,
    "shuffled": shuffled,
    "own generator": lambda: shuffled(generator=torch.Generator().manual_seed(9)),
}
RECIPES = {
    "plain": {},
    "adamw, constant": {"optimizer": "adamw", "schedule": "constant", "clip": 1.0},
    "everything": {"ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "accumulate": 3, "label_smoothing": 0.1},
    "taught": {"teach": True, "holdout": batches(), "distill": 0.7},
    "bf16": {"precision": "bf16"},
}


def run(folder: Path | None, source, *, resume: bool = False, **options) -> tuple[nn.Module, list[dict]]:
    reports: list[dict] = []
    taught = {"teacher": network(5)} if options.pop("teach", False) else {}
    kept = {} if folder is None else {"folder": folder, "resume": resume, "every_minutes": ALWAYS}
    options = {"epochs": 2, "lr": 0.1, "seed": 4, **options}
    return finetune(network(), source, on_epoch=reports.append, **taught, **kept, **options), reports


def timeless(reports: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in reports]


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("source", "recipe", "moments"),
    [
        ("list", "plain", (3, 0, 2, 1)),
        ("list", "everything", (4, 5)),
        ("augmented", "taught", (5, 1, 6)),
        ("shuffled", "adamw, constant", (6, 2)),
        ("own generator", "plain", (3, 7)),
        ("augmented", "everything", (9,)),
        ("list", "bf16", (5,)),
    ],
)
def test_resumed_is_bitwise_the_same(tmp_path, source, recipe, moments):
    whole, reports = run(None, SOURCES[source](), **RECIPES[recipe])
    for moment in moments:
        with pytest.raises(Killed):
            run(tmp_path, Mortal(SOURCES[source](), moment), resume=True, **RECIPES[recipe])
    resumed, again = run(tmp_path, SOURCES[source](), resume=True, **RECIPES[recipe])
    assert same(whole, resumed)
    assert timeless(again) == timeless(reports)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == again
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    finished, _ = run(tmp_path, SOURCES[source](), resume=True, **RECIPES[recipe])
    assert same(whole, finished)


def test_the_folder_changes_nothing_and_neither_does_the_holdout(tmp_path):
    whole, _ = run(None, Augmented())
    kept, _ = run(tmp_path, Augmented())
    judged, reports = run(None, Augmented(), holdout=shuffled())
    assert same(whole, kept)
    assert same(whole, judged)
    assert all(0 <= report["holdout_accuracy"] <= 1 for report in reports)


def begun(folder: Path, **options) -> None:
    with pytest.raises(Killed):
        run(folder, Mortal(batches(), 9), **options)


def test_a_damaged_file_falls_back_to_the_one_before(tmp_path):
    begun(tmp_path)
    newest, before = sorted(tmp_path.glob("checkpoint-*"), reverse=True)
    assert (newest.name, before.name) == ("checkpoint-000000009.safetensors", "checkpoint-000000008.safetensors")
    whole, _ = run(None, batches())
    good = newest.read_bytes()
    for damaged in (good[: len(good) // 2], b"", good[:-3] + b"abc", b"\x00" * len(good)):
        copy_of = tmp_path.parent / f"{tmp_path.name}-{len(damaged)}-{damaged[-3:].hex()}"
        copy_of.mkdir()
        (copy_of / before.name).write_bytes(before.read_bytes())
        (copy_of / newest.name).write_bytes(damaged)
        with pytest.warns(AttrimWarning, match=r"checkpoint-000000009\.safetensors' is damaged .* the one before"):
            resumed, _ = run(copy_of, batches(), resume=True)
        assert same(whole, resumed)


def test_with_no_whole_checkpoint_it_begins_anew(tmp_path):
    (tmp_path / "checkpoint-000000003.safetensors").write_bytes(b"half")
    (tmp_path / ".checkpoint-000000004.safetensors.x1").write_bytes(b"a killed writer's")
    with pytest.warns(AttrimWarning, match="is damaged"):
        resumed, _ = run(tmp_path, batches(), resume=True)
    assert same(run(None, batches())[0], resumed)
    assert not list(tmp_path.glob(".checkpoint*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "new", batches(), resume=True)


def test_a_full_disk_is_named_and_the_folder_stays_resumable(tmp_path, monkeypatch):
    begun(tmp_path)
    genuine, room = os.fsync, [0]

    def full(handle: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"cannot write '.*metrics\.jsonl': No space left .* continue with resume="
    ):
        run(tmp_path, batches(), resume=True)
    room[0] = 1  # the metrics fit, the next checkpoint does not
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, batches(), resume=True)
    assert "cannot write the checkpoint" in str(caught.value)
    assert "No space left on device. The last good one is 'checkpoint-000000009.safetensors'." in str(caught.value)
    assert "continue with resume=True" in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 3  # no half-written file is left: two checkpoints and the metrics
    monkeypatch.setattr(os, "fsync", genuine)
    assert same(run(None, batches())[0], run(tmp_path, batches(), resume=True)[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 0.2}, r"it was made with lr=0\.1, found lr=0\.2\. Pass the same"),
        ({"epochs": 3, "ema": 0.9}, r"made with epochs=2, ema=None, found epochs=3, ema=0\.9"),
        ({"seed": 5}, "made with seed=4, found seed=5"),
        ({"regularizer": lambda m, p: torch.zeros(())}, "made with regularizer=None, found regularizer='.*lambda"),
        ({"teach": True}, "weights of the teacher=None, found weights of the teacher='[0-9a-f]{8}'"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, change, text):
    begun(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        run(tmp_path, batches(), resume=True, **change)


def test_a_checkpoint_of_another_model_or_data_is_refused(tmp_path):
    begun(tmp_path)
    kept = {"folder": tmp_path, "resume": True, "epochs": 2, "lr": 0.1, "seed": 4}
    with pytest.raises(CheckpointError, match=r"made with batches an epoch=7, found batches an epoch=6"):
        finetune(network(), batches()[:6], **kept)
    with pytest.raises(
        CheckpointError, match=r"made with weights of the model='[0-9a-f]{8}', found weights of the model="
    ):
        finetune(network(7), batches(), **kept)
    other = network()
    other[0] = nn.Conv2d(2, 6, 3, bias=False)
    with pytest.raises(CheckpointError, match=r"belongs to another model: '0.bias' is \(6,\) there and absent here"):
        finetune(other, batches(), **kept)


def test_a_run_is_not_overwritten_unasked(tmp_path):
    begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds the checkpoints of an earlier run\. Pass resume=True to go on"):
        run(tmp_path, batches())


def test_nan_names_step_rate_and_last_good_checkpoint(tmp_path):
    data = batches()
    data[4] = (data[4][0] * float("nan"), data[4][1])
    with pytest.raises(InputError) as caught:
        run(tmp_path, data)
    assert "the loss is nan at epoch 1, step 5 of 7, with a learning rate of 0.0874" in str(caught.value)
    assert "The last good checkpoint is '" in str(caught.value)
    assert "checkpoint-000000004.safetensors'." in str(caught.value)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path):
    def spoil(at: float):
        def spoiled(model: nn.Module, progress: float) -> torch.Tensor:  # 0, with a gradient that is not a number
            return (0 * model[5].weight.sum()).sqrt() if progress >= at else torch.zeros(())

        return spoiled

    for folder, at, step, last in (("a", 1.0, "epoch 2, step 7 of 7", 13), ("b", 0.5, "epoch 2, step 1 of 7", 7)):
        with pytest.raises(InputError, match=f"the largest weight is nan at {step}"):
            run(tmp_path / folder, batches(), regularizer=spoil(at))
        assert max(p.name for p in (tmp_path / folder).glob("checkpoint-*")) == f"checkpoint-{last:09d}.safetensors"


ZYGOTE = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_resume import Augmented, run
from pathlib import Path
folder, kills = Path({folder!r}), {kills}
moments = random.Random({seed})
killed = 0
while True:
    child = os.fork()
    if not child:
        run(folder, Augmented(), resume=True, epochs={epochs}, ema=0.9)
        os._exit(0)
    if killed < kills:
        time.sleep(moments.uniform(0.02, {most}))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    killed += 1
print(killed, os.waitstatus_to_exitcode(status))
"""


def killed_for_good(folder: Path, kills: int, seed: int, most: float, epochs: int = 40) -> int:
    script = ZYGOTE.format(
        tests=str(Path(__file__).parent), folder=str(folder), kills=kills, seed=seed, most=most, epochs=epochs
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    killed, status = map(int, done.stdout.split())
    assert status == 0, done.stderr
    resumed, reports = run(folder, Augmented(), resume=True, epochs=epochs, ema=0.9)
    whole, expected = run(None, Augmented(), epochs=epochs, ema=0.9)
    assert same(whole, resumed)
    assert timeless(reports) == timeless(expected)
    return killed


def test_killed_at_random_moments(tmp_path):
    assert killed_for_good(tmp_path, kills=2, seed=0, most=0.2, epochs=12) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_many_times(tmp_path, seed):
    assert killed_for_good(tmp_path, kills=30, seed=seed + 1, most=0.5) >= 5


def test_the_argument_and_the_random_states_are_left_alone(tmp_path):
    model = network()
    before = copy.deepcopy(model)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
    finetune(model, Augmented(), folder=tmp_path, epochs=1, mixup=0.2)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert same(model, before)
    assert not model.training
