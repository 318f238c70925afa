"""The ratio search as one call: what it finds, what it leaves alone, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import attrim
from attrim import Budget
from attrim.errors import AttrimWarning, CheckpointError, DataError, InputError
from attrim.methods.objective import NaiveObjective, best_channels
from attrim.methods.search_job import Ask
from attrim.methods.search_send import Modules, pack
from attrim.recover import evaluate, recalibrate
from nets import Residual, filled, image, random_scores

HALF = Budget(macs=0.5)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return filled(Residual((8, 12), 2, classes=3)).eval()


@pytest.fixture(scope="module")
def images(net) -> list:
    """Four batches; the labels are what the network says, so that it is right about all of them."""
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 3, 8, 8, generator=random) for _ in range(4)]
    with torch.no_grad():
        return [(x, net(x).argmax(1)) for x in batches]


def look(net, images, **options):
    given = {"budget": HALF, "criterion": "l2", "data": images[:2], "holdout": images[2:], "evaluations": 12}
    return attrim.search(net, image(1, 3, 8, 8), **{**given, **options})


class Worth:
    """An objective that can be sent to another process: uneven, and known without any image."""

    def __init__(self, channels, seconds=0.0, log=None):
        self.sizes, self.seconds, self.log = (
            dict(zip(channels.cost.groups, channels.cost.sizes.tolist(), strict=True)),
            seconds,
            log,
        )

    def __call__(self, kept):
        time.sleep(self.seconds)
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(json.dumps([os.getpid(), *kept.values()]) + "\n")
        weights = np.random.default_rng(1).lognormal(0, 1, len(kept))
        lost = np.array([1 - kept[g] / n for g, n in self.sizes.items()])
        return -float((weights * lost**2).sum())


@pytest.fixture(scope="module")
def channels(net):
    return attrim.trace(net, image(1, 3, 8, 8))


def test_the_result_is_the_best_network_within_the_budget(net, images, channels) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = look(net, images)
    assert len(found.trials) == len(found.curve) == 12
    assert found.value == max(t.value for t in found.trials) == found.curve[-1]
    small = attrim.apply(net, found.plan)
    assert evaluate(recalibrate(small, images[:2]), images[2:]) == found.value
    assert found.plan.provenance["macs_after"] <= 0.5 * found.plan.provenance["macs_before"]
    assert {g: note["kept"] for g, note in found.plan.groups.items()} == found.best
    assert found.plan.provenance["search"] == {
        "algorithm": "neighbourhood", "start": "uniform", "seed": 0, "evaluations": 12, "value": found.value,
    }  # fmt: skip
    assert found.plan.provenance["criterion"] == "l2"
    assert attrim.verify(net, small, found.plan, image(1, 3, 8, 8)).ok
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert found.study is None
    assert "best of 12 candidates" in str(found)


def test_naive_and_fast_objectives_agree(net, images) -> None:
    naive = look(net, images, objective="naive")
    whole = look(net, images, objective="fast", early_stop=False)
    assert [t.kept for t in naive.trials] == [t.kept for t in whole.trials]
    assert [t.value for t in naive.trials] == pytest.approx([t.value for t in whole.trials], abs=1 / 32 + 1e-9)
    assert look(net, images).value == pytest.approx(naive.value, abs=1 / 32 + 1e-9)


def test_less_memory_changes_no_value(net, images, channels) -> None:
    objective = Ask(net, channels, random_scores(channels), "fast", images[:1], images[1:], memory=0).make()
    assert objective._origins.layout.nbytes == 0
    plenty, none = (look(net, images, early_stop=False, memory=memory) for memory in (1 << 30, 0))
    assert [t.kept for t in none.trials] == [t.kept for t in plenty.trials]
    assert [t.value for t in none.trials] == pytest.approx([t.value for t in plenty.trials])


def test_a_metric_takes_the_place_of_accuracy(net, images) -> None:
    loss = nn.functional.cross_entropy
    found = look(net, images, metric=lambda outputs, batch: -loss(outputs, batch[1]), evaluations=5)
    small = recalibrate(attrim.apply(net, found.plan), images[:2]).eval()
    with torch.no_grad():
        expected = -sum(loss(small(x), y).item() for x, y in images[2:]) / 2
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.value < 0


def test_refitting_candidates_raises_them(net, images) -> None:
    plain, refitted = (look(net, images, algorithm="uniform", objective="naive", refit=r) for r in (False, True))
    assert refitted.best == plain.best
    assert refitted.value >= plain.value


def test_own_objectives_scores_and_searches(net, channels) -> None:
    def backwards(space, start, seed):
        here = yield from start(space)
        yield [here]
        yield [space.project(-space.ratios(here))]

    scores = random_scores(channels, 4)
    found = attrim.search(
        net, image(1, 3, 8, 8), budget=HALF, criterion=scores, objective=Worth(channels), algorithm=backwards
    )
    assert len(found.trials) == 2
    assert found.scores is scores
    assert found.value == Worth(channels)(found.best)
    kept = best_channels(channels, scores, found.best)
    group = next(iter(kept))
    assert scores.values[group][kept[group]].min() >= scores.values[group].sort().values[-len(kept[group])]
    assert found.plan.provenance["search"]["algorithm"].endswith("backwards")
    again = attrim.search(
        net,
        image(1, 3, 8, 8),
        budget=HALF,
        criterion=lambda *_: scores,
        objective=Worth(channels),
        channels=channels,
        evaluations=100,
    )
    assert again.value > found.value


def test_a_dead_network_is_hopeless_and_no_end(net, channels) -> None:
    def fragile(kept):
        return math.nan if min(kept.values()) < 5 else min(kept.values())

    found = attrim.search(
        net, image(1, 3, 8, 8), budget=HALF, criterion="l2", objective=fragile, evaluations=30, algorithm="random"
    )
    assert found.value >= 5
    assert any(t.value == -math.inf for t in found.trials)


@pytest.mark.parametrize("objective", ["naive", "fast", None])
def test_an_interrupted_search_goes_on_to_the_same_end(net, images, tmp_path, objective) -> None:
    whole = look(net, images, objective=objective, evaluations=18)

    def stop(done):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(net, images, objective=objective, evaluations=18, folder=tmp_path, on_progress=stop)
    with pytest.raises(CheckpointError, match=r"holds this search already.*Pass resume=True"):
        look(net, images, objective=objective, evaluations=18, folder=tmp_path)
    found = look(net, images, objective=objective, evaluations=18, folder=tmp_path, resume=True)
    assert found.trials == whole.trials
    assert found.best == whole.best
    assert found.plan.cuts == whole.plan.cuts
    told = []
    again = look(
        net, images, objective=objective, evaluations=18, folder=tmp_path, resume=True,
        on_trial=lambda number, trial, best: told.append((number, best.value)),
    )  # fmt: skip
    assert again.trials == whole.trials
    assert told == list(enumerate(whole.curve, 1))


def test_scores_are_computed_once_for_all_runs_of_a_search(net, images, tmp_path) -> None:
    calls = []

    def criterion(model, channels, batches):
        calls.append(1)
        return {g.id: torch.rand(g.size) for g in channels}  # another ranking each time

    first = look(net, images, criterion=criterion, folder=tmp_path, evaluations=5)
    second = look(net, images, criterion=criterion, folder=tmp_path, evaluations=8, resume=True)
    assert len(calls) == 1
    assert second.trials[:5] == first.trials
    assert {g: v.tolist() for g, v in second.scores.values.items()} == {
        g: v.tolist() for g, v in first.scores.values.items()
    }


def test_another_search_in_the_same_storage_is_another_study(net, images, tmp_path) -> None:
    where = tmp_path / "all.journal"
    names = {look(net, images, storage=where, seed=seed, evaluations=3).study for seed in range(3)}
    other = filled(Residual((8, 12), 2, classes=3), seed=5).eval()
    names.add(look(other, images, storage=where, evaluations=3).study)
    names.add(look(net, images, storage=where, evaluations=3, budget=Budget(macs=0.6)).study)
    assert len(names) == 5
    look(net, images, storage=where, study="mine", evaluations=3)
    with pytest.raises(
        CheckpointError, match=r"the study 'mine' .* is another search: it was made with seed=0, found seed=1"
    ):
        look(net, images, storage=where, study="mine", evaluations=3, seed=1, resume=True)


def test_the_front(net, images, tmp_path) -> None:
    found = look(net, images, algorithm="nsga2", evaluations=60, objective="naive", folder=tmp_path)
    cost = found.channels.cost
    macs = [cost.macs(list(t.kept)) for t in found.front]
    values = [t.value for t in found.front]
    assert macs == sorted(macs)
    assert values == sorted(set(values))
    assert cost.macs(found.best) <= 0.5 * cost.macs()
    for trial in found.trials:
        assert any(m <= cost.macs(list(trial.kept)) and v >= trial.value for m, v in zip(macs, values, strict=True))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(net, channels, tmp_path) -> None:
    log = tmp_path / "log"
    given = {"budget": HALF, "criterion": "l2", "channels": channels, "evaluations": 40}
    alone = attrim.search(net, image(1, 3, 8, 8), objective=Worth(channels), **given)
    together = attrim.search(
        net, image(1, 3, 8, 8), objective=Worth(channels, 0.25, str(log)), workers=2, folder=tmp_path, **given
    )
    assert together.trials == alone.trials
    assert together.best == alone.best
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({tuple(line[1:]) for line in lines}) == len(lines) == 40
    assert len({line[0] for line in lines}) == 2


SCRIPT = """
import sys
sys.path[:0] = {paths}
import attrim, torch
from nets import Residual, filled, image
from test_search import Worth

if __name__ == "__main__":
    net = filled(Residual((8, 12), 2, classes=3)).eval()
    channels = attrim.trace(net, image(1, 3, 8, 8))
    attrim.search(net, image(1, 3, 8, 8), budget=attrim.Budget(macs=0.5), criterion="l2", channels=channels, evaluations=30,
                  objective=Worth(channels, 0.15, {log!r}), workers=2, folder={folder!r})
"""


@pytest.mark.slow
def test_a_killed_run_takes_its_workers_along_and_goes_on(net, channels, tmp_path) -> None:
    log = tmp_path / "log"
    here = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parent)], log=str(log), folder=str(tmp_path / "run")))
    process = subprocess.Popen([sys.executable, str(script)])
    lines: list = []
    while len({line[0] for line in lines}) < 2 and process.poll() is None:
        time.sleep(0.05)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.5)  # the other process finishes its candidate, sees that it is alone, and ends
    before = len(log.read_text().splitlines())
    time.sleep(0.5)
    assert len(log.read_text().splitlines()) == before < 30
    given = {"budget": HALF, "criterion": "l2", "channels": channels, "evaluations": 30}
    found = attrim.search(
        net, image(1, 3, 8, 8), objective=Worth(channels, 0, str(log)), folder=tmp_path / "run", resume=True, **given
    )
    assert found.trials == attrim.search(net, image(1, 3, 8, 8), objective=Worth(channels), **given).trials
    assert len(log.read_text().splitlines()) in (30, 31)  # at most the candidate that was killed twice


class Dies(Worth):
    """Kills every process but one."""

    def __init__(self, channels, mine):
        super().__init__(channels, 0.1)
        self.mine = mine

    def __call__(self, kept):
        if os.getpid() != self.mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(kept)


@pytest.mark.slow
def test_a_worker_that_dies_is_told_of_and_its_work_is_done(net, channels) -> None:
    given = {"budget": HALF, "criterion": "l2", "channels": channels, "evaluations": 100}
    with pytest.warns(AttrimWarning, match=r"a worker process died \(exit code -9\); the others did its work"):
        found = attrim.search(net, image(1, 3, 8, 8), objective=Dies(channels, os.getpid()), workers=2, **given)
    assert found.trials == attrim.search(net, image(1, 3, 8, 8), objective=Worth(channels), **given).trials


def test_what_is_sent_to_workers_comes_out_as_it_was(net, images, channels) -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    tied[1].weight = tied[0].weight
    batches = [(torch.arange(6).reshape(2, 3), {"mask": torch.tensor([True, False])}), (torch.tensor(3.5), "name")]
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    ask = pack(Ask(tied, channels, random_scores(channels), "naive", batches, [])).unpack()
    assert ask.model[0].weight is ask.model[1].weight
    assert all(torch.equal(before[name], tensor) for name, tensor in ask.model.state_dict().items())
    assert ask.model[0].weight.data_ptr() != tied[0].weight.data_ptr()
    assert ask.model[0].weight.dtype == torch.bfloat16
    (number, named), (scalar, text) = ask.calibration
    assert number.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert named["mask"].tolist() == [True, False]
    assert scalar.item() == 3.5
    assert text == "name"


def test_classes_from_files_are_found_by_workers(tmp_path) -> None:
    import importlib.util
    import multiprocessing.reduction as reduction

    file = tmp_path / "odd_net.py"
    file.write_text("from torch import nn\nclass Odd(nn.Linear):\n    pass\n")
    spec = importlib.util.spec_from_file_location("odd_net_of_a_test", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["odd_net_of_a_test"] = module
    spec.loader.exec_module(module)
    modules = Modules.behind([module.Odd(2, 2), nn.Linear(1, 1), test_the_front])
    assert modules.files == {"odd_net_of_a_test": str(file)}
    sent = reduction.ForkingPickler.dumps(modules)
    del sys.modules["odd_net_of_a_test"]
    assert reduction.ForkingPickler.loads(sent).files == modules.files
    assert sys.modules.pop("odd_net_of_a_test").Odd(2, 2).weight.shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5}, r"budget: expected an attrim\.Budget, found 0\.5"),
        ({"algorithm": "swarm"}, "algorithm: expected one of neighbourhood, uniform"),
        ({"algorithm": 3}, "algorithm: expected a name or a function"),
        ({"algorithm": "bee", "settings": {"delta": 0.1}}, "the search 'bee' has none"),
        (
            {"settings": {"width": 2}},
            "settings: expected groups, delta, finest, neighbours, failures, shift, siblings, found width",
        ),
        ({"start": "middle"}, "start: expected one of uniform, global, sensitivity, found 'middle'"),
        ({"objective": "slow"}, "objective: expected fast, naive or a function"),
        ({"objective": "fast", "refit": True}, "metric and refit are for objective='naive'"),
        ({"evaluations": 0}, "evaluations: expected an int >= 1"),
        ({"workers": 0}, "workers: expected an int >= 1"),
        ({"recalibration": 0}, "recalibration: expected a number of batches >= 1"),
        ({"memory": 1.5}, "memory: expected a number of bytes >= 0, such as 4 << 30, found 1.5"),
        ({"memory": -1}, "memory: expected a number of bytes >= 0"),
        ({"heartbeat": -1}, "heartbeat: expected seconds > 0"),
        ({"grace": 5}, "grace: expected at least twice the heartbeat"),
        ({"resume": True}, "resume=True goes on with the trials in a folder or a storage"),
        ({"holdout": None}, "holdout: candidates are judged on labelled training images"),
        ({"data": None}, "data: expected batches of training images"),
        ({"data": iter([])}, "data: expected batches that can be gone through again"),
        ({"objective": lambda kept: "high"}, "objective: expected a float, found 'high'"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(net, images, options, message) -> None:
    with pytest.raises(InputError, match=message):
        look(net, images, **options)


def test_what_cannot_be_sent_is_said(net, images, channels) -> None:
    with pytest.raises(InputError, match="workers: the search cannot be sent to another process"):
        look(net, images, objective=lambda kept: 0.0, channels=channels, workers=2)


def test_the_naive_objective_needs_batches(net, images, channels) -> None:
    scores = random_scores(channels)
    with pytest.raises(DataError, match="holdout: no batch"):
        NaiveObjective(net, channels, scores, images, [])
    with pytest.raises(DataError, match="data: no batch"):
        NaiveObjective(net, channels, scores, [], images)
    with pytest.raises(InputError, match="group 'conv1' has no scores, so it stays whole; found 1 of 8 channels"):
        best_channels(channels, attrim.Scores({}, "none"), {"conv1": 1})
