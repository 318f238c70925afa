"""Rounds of pruning: budgets of the original, one plan in the end, and a killed run that ends as an undisturbed one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import Budget, Scores
from attrim.errors import BudgetError, CheckpointError, InputError, PlanError
from attrim.methods.round_budget import Floors, RoundBudget, budget_of_round, kept_after
from attrim.methods.rounds import prune_rounds
from nets import Attention, Residual, filled, image

pytestmark = pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")  # small networks are coarse


def net() -> nn.Module:
    return filled(Residual((12, 16), 1, classes=5))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(image(8, 3, 8, 8, seed=k), torch.arange(8) % 5) for k in range(count)]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def widths(result: attrim.PruneResult) -> dict[str, tuple[int, int]]:
    return {name: (note["size"], note["kept"]) for name, note in result.plan.groups.items()}


@pytest.mark.parametrize("schedule", ["geometric", "linear"])
@pytest.mark.parametrize("recover", [None, "free"])
def test_rounds_end_at_the_budget_with_one_proved_plan(schedule: Any, recover: Any) -> None:
    model, seen = net(), []
    result = prune_rounds(
        model, image(), budget=Budget(macs=0.4), rounds=3, schedule=schedule, method="l2", data=batches(), recover=recover,
        on_round=lambda number, part: seen.append((number, part)),
    )  # fmt: skip
    assert [number for number, _ in seen] == [1, 2, 3]
    whole = attrim.trace(model, image()).cost.macs()
    for number, part in seen:
        target = kept_after(Budget(macs=0.4), "macs", number, 3, schedule)
        assert target - 0.03 < part.after.macs / whole <= target
    assert (result.before.macs, result.after.macs) == (whole, attrim.trace(result.model, image()).cost.macs())
    assert result.after.params == sum(p.numel() for p in result.model.parameters())
    assert result.plan.fingerprint == result.channels.fingerprint == attrim.trace(model, image()).fingerprint
    small = attrim.apply(model, result.plan)
    assert result.verification.ok
    assert attrim.verify(model, small, result.plan, image()).ok
    assert [t.shape for t in small.state_dict().values()] == [t.shape for t in result.model.state_dict().values()]
    assert same(small, result.model) == (recover is None)
    assert [step["step"] for step in result.steps if step["round"] == 2][:2] == ["cut", "verify"]
    assert result.plan.provenance["budget"]["macs"] == 0.4
    assert result.plan.provenance["rounds"] == 3


def test_one_round_is_prune() -> None:
    model = net()
    one = prune_rounds(model, image(), budget=Budget(macs=0.5), rounds=1, method="l1")
    other = attrim.prune(model, image(), budget=Budget(macs=0.5), method="l1")
    assert one.plan.cuts == other.plan.cuts
    assert same(one.model, other.model)
    assert [step["step"] for step in one.steps] == [step["step"] for step in other.steps]


def test_weight_criteria_without_recovery_cut_the_same_channels_as_at_once() -> None:
    """Random scores by a channel's original number: what goes does not depend on the rounds."""
    model = net()
    rank = {g.id: torch.rand(g.size, generator=torch.Generator().manual_seed(i)) for i, g in enumerate(channels(model))}
    kept = {name: torch.arange(len(value)) for name, value in rank.items()}

    def fixed(_model: nn.Module, now: attrim.ChannelMap, _data: Any) -> Scores:
        for group in now:
            if len(kept[group.id]) != group.size:  # the survivors of the round before: the best ones
                kept[group.id] = rank[group.id].argsort(descending=True)[: group.size].sort().values
        return Scores({group.id: rank[group.id][kept[group.id]] for group in now}, "fixed")

    at_once = attrim.prune(model, image(), budget=Budget(channels=0.5), method=fixed)
    kept = {name: torch.arange(len(value)) for name, value in rank.items()}
    rounds = prune_rounds(model, image(), budget=Budget(channels=0.5), rounds=3, method=fixed)
    assert {n: dict(c.keep) for n, c in rounds.plan.cuts.items()} == {
        n: dict(c.keep) for n, c in at_once.plan.cuts.items()
    }


def channels(model: nn.Module) -> attrim.ChannelMap:
    return attrim.trace(model, image())


@pytest.mark.parametrize("scope", ["global", "group", "isomorphic"])
@pytest.mark.parametrize("floor", [{"min_keep": 0.4}, {"max_removed": 0.6, "min_keep": 1}, {"min_keep": 5}])
def test_floors_mean_the_original(scope: Any, floor: dict[str, Any]) -> None:
    budget = Budget(channels=0.5, scope=scope, **floor)
    result = prune_rounds(net(), image(), budget=budget, rounds=4, method="l2")
    assert result.after.channels <= 0.5 * result.before.channels
    for size, kept in widths(result).values():
        assert kept >= budget.floor(size)


def weakest(*names: str):
    """A criterion for which everything in some groups is worth nothing."""
    return lambda model, now, data: Scores(
        {g.id: torch.arange(g.size) + 100.0 * (g.id not in names) for g in now}, "mine"
    )


class Chain(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_groups_of_one_width_keep_floors_of_their_own() -> None:
    """40 channels shrink to the 12 that the other group began with; their floors are 10 and 3 all the same."""
    result = prune_rounds(
        Chain(4, 40, 12, 3), image(2, 4), rounds=2, method=weakest("layers.0"),
        budget=Budget(channels=13 / 52, min_keep=0.25), schedule="linear",
    )  # fmt: skip
    assert widths(result) == {"layers.0": (40, 10), "layers.1": (12, 3)}
    first = Floors(Budget(macs=0.5, min_keep=0.25), {"a": 40, "b": 12}, {"a": 12, "b": 12})
    assert (first.of("a", 12), first.of("b", 12), first.by_width(lifted=True)) == (10, 3, {"12": 3})
    assert first.by_width(lifted=False) == {"12": 10}
    grouped = Floors(Budget(macs=0.5, min_keep=0.25, scope="group"), first.sizes, first.now)
    assert (first.ways("l2"), grouped.ways("l2"), first.ways("pcas")) == ((True,), (False, True), (False, True))


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_groups_that_meet_at_one_width_do_not_put_a_budget_out_of_reach(scope: Any) -> None:
    """40 and 20 channels are 19 and 19 after the first round; 16 of both are left, floors are 10 and 5."""
    seen = []

    def ends(_model: nn.Module, now: attrim.ChannelMap, _data: Any) -> Scores:
        top = {g.id: 100.0 * (torch.arange(g.size) >= g.size - 19) * (g.size > 19) for g in now}
        return Scores({g.id: top[g.id] + torch.arange(g.size) + 50.0 * (g.id == "layers.0") for g in now}, "ends")

    result = prune_rounds(
        Chain(4, 40, 20, 3), image(2, 4), rounds=2, method=ends, schedule="linear",
        budget=Budget(channels=0.267, min_keep=0.25, scope=scope), on_round=lambda _, part: seen.append(widths(part)),
    )  # fmt: skip
    assert seen[0] == {"layers.0": (40, 19), "layers.1": (20, 19)}
    assert widths(result) == {"layers.0": (40, 11), "layers.1": (20, 5)}


def test_multiples_and_frozen_groups_hold_in_every_round() -> None:
    seen = []
    budget = Budget(channels=0.6, multiple_of=4, frozen=("layers.1.conv1.weight:0",), min_keep=0.3)
    result = prune_rounds(
        net(), image(), budget=budget, rounds=3, method="l2", on_round=lambda _, part: seen.append(widths(part))
    )
    for found in (*seen, widths(result)):
        assert all(kept % 4 == 0 for _, kept in found.values())
        assert found["layers.1.conv1"] == (16, 16)
    assert all(kept >= 0.3 * size for size, kept in widths(result).values())


def test_several_limits_at_once_and_inexact_networks() -> None:
    model = filled(Attention())
    result = prune_rounds(model, image(2, 7, 12), budget=Budget(params=0.6, macs=0.55, scope="group"), rounds=2)
    assert result.after.params <= 0.6 * result.before.params
    assert result.after.macs <= 0.55 * result.before.macs
    assert (result.verification.ok, result.verification.exact) == (True, False)


def test_budgets_of_the_rounds() -> None:
    assert kept_after(Budget(macs=0.125), "macs", 1, 3, "geometric") == pytest.approx(0.5)
    assert kept_after(Budget(macs=0.4), "macs", 1, 3, "linear") == pytest.approx(0.8)
    assert kept_after(Budget(macs=0.4), "params", 1, 3, "linear") is None
    plan = attrim.prune(net(), image(), budget=Budget(macs=0.5)).plan
    assert budget_of_round(Budget(macs=0.25), plan, 1, 2, "geometric") is None  # 0.5 is there already
    second = budget_of_round(Budget(macs=0.25), plan, 2, 2, "geometric")
    before, after = plan.provenance["macs_before"], plan.provenance["macs_after"]
    assert int(second.macs * after + 1e-9) == pytest.approx(before // 4, abs=1)
    assert isinstance(second, RoundBudget)


def test_a_round_with_nothing_to_cut_is_left_out() -> None:
    model = Chain(2, 2, 2)
    result = prune_rounds(model, image(2, 2), budget=Budget(channels=0.5), rounds=3)
    assert widths(result) == {"layers.0": (2, 1)}
    assert [(s["round"], s["step"]) for s in result.steps] == [
        (1, "cut"), (1, "verify"), (2, "left out"), (3, "left out"),
    ]  # fmt: skip


def test_training_in_every_round_learns_from_the_original(monkeypatch) -> None:
    model, teachers = net(), []
    import attrim.methods.pipeline as pipeline

    def spy(small, data, *, teacher, epochs, **rest):
        teachers.append((teacher is model, epochs))
        return small

    monkeypatch.setattr(pipeline, "finetune", spy)
    prune_rounds(
        model, image(), budget=Budget(macs=0.5), rounds=2, data=batches(), recover="finetune", training={"epochs": 1}
    )
    assert teachers == [(True, 1), (True, 1)]


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_a_method_is_run_whole_in_every_round(scope: Any) -> None:
    """cpsca trains the network that it cuts, so every round changes the weights that stay."""
    model = net()
    result = prune_rounds(
        model, image(), budget=Budget(macs=0.75, scope=scope), rounds=2, method="cpsca", data=batches(), epochs=1
    )
    done = [(step["round"], step["step"]) for step in result.steps]
    assert [number for number, step in done if step == "trained"] == [1, 2]
    assert result.verification.ok
    assert result.after.macs <= 0.75 * result.before.macs
    assert not same(attrim.apply(model, result.plan), result.model)


def test_the_seed_reaches_the_gates_of_every_round() -> None:
    def attention(seed: int) -> list[Tensor]:
        found: list[Tensor] = []
        prune_rounds(
            net(), image(), budget=Budget(macs=0.5), rounds=2, method="pcas", data=batches(), epochs=1, seed=seed,
            on_round=lambda _, part: found.append(part.outcome.statistics["attention"].mean["layers.0.conv1"]),
        )  # fmt: skip
        return found

    one, two, other = attention(0), attention(0), attention(7)
    assert len(one) == 2
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])


def test_the_seed_reaches_random_scores() -> None:
    one, two, other = (
        prune_rounds(net(), image(), budget=Budget(macs=0.5), rounds=2, method="random", seed=seed).plan.cuts
        for seed in (0, 0, 7)
    )
    assert one == two != other


class Killed(Exception):
    pass


def run(model: nn.Module, folder: Any, **more: Any) -> attrim.PruneResult:
    settings: dict[str, Any] = {"recover": "finetune", "training": {"epochs": 1}, "rounds": 3, "method": "taylor"}
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*(torch.cat(t) for t in zip(*batches(4), strict=True))), 8, shuffle=True
    )
    return prune_rounds(model, image(), budget=Budget(macs=0.4), data=loader, folder=folder, **{**settings, **more})


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path, after: int) -> None:
    model, state = net(), torch.get_rng_state()
    whole = run(model, None)
    assert torch.equal(torch.get_rng_state(), state)

    def kill(number: int, _: Any) -> None:
        if number == after:
            raise Killed

    with pytest.raises(Killed):
        run(model, tmp_path / "run", on_round=kill)
    torch.manual_seed(99)
    resumed = run(model, tmp_path / "run", resume=True)
    assert same(whole.model, resumed.model)
    assert whole.plan.to_json() == resumed.plan.to_json()
    assert whole.steps == resumed.steps
    again = run(model, tmp_path / "run", resume=True)
    assert same(whole.model, again.model)
    assert again.plan.to_json() == whole.plan.to_json()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["round-1", "round-2", "round-3", "rounds.json"]
    loaded = attrim.load(tmp_path / "run" / "round-3", model=net())
    assert same(whole.model, loaded)


def test_a_half_written_round_is_done_again(tmp_path, monkeypatch) -> None:
    model = net()
    whole = run(model, None, rounds=2, recover=None, training=None)
    import attrim.methods.round_store as round_store

    real = round_store.save

    def half(small, plan, directory):
        real(small, plan, directory)
        if directory.name == "round-2":
            (directory / "model.safetensors").write_bytes(b"half")
            raise Killed

    monkeypatch.setattr(round_store, "save", half)
    with pytest.raises(Killed):
        run(model, tmp_path, rounds=2, recover=None, training=None)
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "rounds.json").read_text())["finished"]) == 1
    assert same(whole.model, run(model, tmp_path, rounds=2, recover=None, training=None, resume=True).model)


def test_folders_of_other_runs_are_refused(tmp_path) -> None:
    model, plain = net(), {"rounds": 2, "recover": None, "training": None}
    run(model, tmp_path, **plain)
    with pytest.raises(CheckpointError, match=r"holds the rounds of an earlier run\. Pass resume=True"):
        run(model, tmp_path, **plain)
    with pytest.raises(CheckpointError, match=r"made with method='taylor', rounds=2, found method='l1', rounds=3"):
        run(model, tmp_path, **{**plain, "rounds": 3}, method="l1", resume=True)
    with pytest.raises(CheckpointError, match="made with weights="):
        run(filled(Residual((12, 16), 1, classes=5), seed=4), tmp_path, **plain, resume=True)
    (tmp_path / "round-2" / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="corrupt"):
        run(model, tmp_path, **plain, resume=True)
    (tmp_path / "rounds.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"rounds.json' is damaged"):
        run(model, tmp_path, **plain, resume=True)


def test_wrong_arguments_are_refused_before_any_work(tmp_path) -> None:
    model = net()
    with pytest.raises(InputError, match="rounds: expected an int >= 1, found 0"):
        prune_rounds(model, image(), budget=Budget(macs=0.5), rounds=0)
    with pytest.raises(InputError, match="schedule: expected one of geometric, linear"):
        prune_rounds(model, image(), budget=Budget(macs=0.5), schedule="cubic")
    with pytest.raises(InputError, match="resume=True goes on from a folder"):
        prune_rounds(model, image(), budget=Budget(macs=0.5), resume=True)
    with pytest.raises(InputError, match="training: folder would be shared by all rounds"):
        prune_rounds(
            model, image(), budget=Budget(macs=0.5), training={"folder": "x"}, recover="finetune", data=batches()
        )
    calls: list[int] = []
    with pytest.raises(BudgetError, match="the budget cannot be met"):
        prune_rounds(model, image(), budget=Budget(macs=0.01), on_round=lambda number, _: calls.append(number))
    assert not calls
