"""GlobalPru as a whole: what it leaves alone, its claims on digits with the controls beside it, its term, its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from some import batches, digits, on_digits, setting
from torch import Tensor, nn

import attrim
from attrim import Budget
from attrim.errors import AttrimWarning, BudgetError, CriterionError, InputError
from attrim.methods.globalpru import MaskAccuracy, Ranking, globalpru, history
from attrim.methods.globalpru.objective import TowardsOrder
from attrim.methods.globalpru.scores import Reader
from attrim.methods.table import METHODS
from attrim.modules.gates import Gated, Gates
from nets import Mobile, Plain, Residual, filled, image

pytestmark = pytest.mark.filterwarnings("ignore:the widths are too coarse:attrim.AttrimWarning")

QUICK: dict[str, Any] = {"ratio": 0.5, "warmup_epochs": 1, "epochs": 2, "lr": 0.1, "warmup_lr": 0.1}


def run(network: nn.Module | None = None, data: Any = None, **options: Any) -> tuple[nn.Module, Any]:
    model = filled(network or Plain())
    data = batches() if data is None else data
    return model, globalpru(model, attrim.trace(model, data[0][0]), data, **{**QUICK, **options})


def test_the_original_stays_and_the_first_of_each_order_stay() -> None:
    model = filled(Plain()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    state, data = torch.get_rng_state(), batches()
    outcome = globalpru(model, attrim.trace(model, data[0][0]), data, holdout=data, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    trained = outcome.statistics["network"].state_dict()
    assert not torch.equal(trained["conv1.weight"], before["conv1.weight"])
    assert not torch.equal(trained["bn1.running_mean"], before["bn1.running_mean"])
    for group, order in outcome.statistics["orders"].items():
        kept = outcome.plan.cuts[f"{group}.weight"].keep[0]
        assert len(kept) == outcome.statistics["kept"][group] == len(order) // 2
        assert set(kept) == set(order[: len(kept)].tolist())
        assert outcome.scores.values[group].argsort(descending=True).tolist() == order.tolist()
    small = attrim.apply(outcome.model_to_cut, outcome.plan)
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert attrim.verify(outcome.model_to_cut, small, outcome.plan, data[0][0]).exact


def test_what_is_cut_is_the_trained_network_with_its_mean_attention_folded_in() -> None:
    given: dict[str, Any] = {"data": digits()[0][:6], "warmup_lr": 0.5, "warmup_epochs": 2, "epochs": 0}
    _, outcome = run(**given)
    factors = outcome.statistics["attention"].factors()
    images, network = digits()[1][0][0], outcome.statistics["network"]
    assert outcome.gates is not None
    with torch.no_grad(), outcome.gates.attached(network, fixed=factors):
        expected = network(images)
    assert torch.allclose(outcome.model_to_cut(images), expected, atol=1e-5)
    assert not torch.allclose(network(images), expected, atol=1e-3)
    _, dropped = run(**given, end="drop")
    assert dropped.model_to_cut is dropped.statistics["network"]
    assert torch.equal(dropped.model_to_cut(images), network(images))


def test_samples_come_to_agree_and_one_mask_becomes_as_good_as_one_each() -> None:
    """The paper's claim. Without the ranking loss it does not happen (next test)."""
    found = history(on_digits())
    assert found.epochs == tuple(range(6, 15))
    assert found.rose("tau") == found.rose("overlap") == {"conv1": True, "conv2": True}
    assert min(found.tau[g][-1] for g in found.tau) > 0.99
    assert min(found.overlap[g][-1] for g in found.tau) == 1.0
    assert found.tau["conv2"][0] < 0.8
    assert found.before is not None
    assert found.after is not None
    assert abs(found.before.gap) > 0.02
    assert found.after.gap == 0.0
    assert found.after.shared > found.before.shared + 0.4
    assert found.after.open > 0.97


def test_vote_only_does_not_bring_samples_together() -> None:
    found = history(on_digits(strength=0.0, sparsity=0.0))
    assert len(found.tau["conv2"]) == 9  # it is watched all the same
    assert found.rose("tau") == {"conv1": False, "conv2": False}
    assert found.after is not None
    assert found.after.shared < 0.6


def test_a_random_order_is_learned_too_and_serves_worse_than_the_voted_one() -> None:
    voted, drawn = history(on_digits()), history(on_digits(vote="random"))
    assert abs(drawn.tau["conv1"][0]) < 0.5
    assert min(drawn.tau[g][-1] for g in drawn.tau) > 0.95
    assert voted.after is not None
    assert drawn.after is not None
    assert voted.after.shared > drawn.after.shared


@pytest.mark.parametrize("form", ["listwise", "hinge"])
def test_the_other_losses_work_too(form: Any) -> None:
    found = history(on_digits(form=form, strength={"listwise": 0.3, "hinge": 5.0}[form]))
    assert found.rose("tau")["conv2"]
    assert found.after is not None
    assert abs(found.after.gap) < 0.05


@pytest.mark.parametrize("vote", ["position", "topk", "borda", "mean"])
def test_every_ballot_runs(vote: Any) -> None:
    _, outcome = run(vote=vote)
    assert sorted(outcome.statistics["orders"]["conv2"].tolist()) == list(range(12))


def test_voting_again_follows_the_network() -> None:
    outcome = on_digits(revote_every=2, monitor=100)
    entries = outcome.statistics["epochs"]
    assert [e["stage"] for e in entries if e["stage"].startswith("vote")] == ["vote-0", "vote-1", "vote-2"]
    assert [e["epoch"] for e in entries if e["stage"].startswith("vote")] == [6, 8, 10]
    stages = [e["stage"] for e in entries if e["stage"].startswith("sparse")]
    assert stages == ["sparse-0"] * 2 + ["sparse-1"] * 2 + ["sparse-2"] * 4
    rates = [e["lr"] for e in entries if e["stage"].startswith("sparse")]
    assert rates[1] == rates[2] == 0.1 > rates[-1]  # one training in parts: the rate falls at its end alone
    assert history(outcome).rose("tau")["conv2"]


def test_attention_decides_how_much_of_each_group_stays_where_it_is_asked_to() -> None:
    _, channels, _, _ = setting()
    _, outcome = run(alloc="attention", ratio=0.4)
    kept = outcome.statistics["kept"]
    assert sum(kept.values()) == 12
    assert kept == {g: outcome.plan.groups[g]["kept"] for g in kept}
    for group, order in outcome.statistics["orders"].items():
        assert outcome.scores.values[group].argsort(descending=True).tolist() == order.tolist()
    assert len(channels) == 2


def test_the_term_is_its_formula_and_rises_with_the_ramp() -> None:
    model, _, gates, data = setting()
    gated = Gated(model, gates, frozen=False)
    orders = {"conv1": torch.randperm(8), "conv2": torch.randperm(12)}
    kept = {"conv1": 3, "conv2": 12}
    given: dict[str, Any] = {"ranking": Ranking(), "reader": Reader(), "strength": 2.0, "sparsity": 0.1}
    towards = TowardsOrder(orders, kept, ramp=0.4, part=(0.2, 0.6), **given)
    gated(data[0][0])
    assert gated.collected is not None
    expected = {}
    for group in orders:
        logits, attention = gated.collected.logits[group][0], gated.collected.attention[group][0]
        tail = attention[:, orders[group][kept[group] :]]
        expected[group] = (Ranking()(logits, orders[group], kept[group]), tail.mean() if tail.numel() else 0.0)
    for progress, ramp in ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (1.0, 1.0)):
        total = sum(ramp * 2.0 * ranked + 0.1 * tail for ranked, tail in expected.values()) / 2
        assert torch.allclose(towards(gated, progress), torch.as_tensor(total), rtol=1e-12)
    towards(gated, 1.0).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in gates.parameters())
    assert model.conv1.weight.grad is not None  # what the gates see is pressed as well
    assert TowardsOrder(orders, kept, ramp=0.0, **given)(gated, 0.0) == towards(gated, 1.0)
    only_tail = TowardsOrder(orders, kept, ramp=0.0, **{**given, "strength": 0.0})(gated, 1.0)
    assert torch.allclose(only_tail, 0.1 * expected["conv1"][1] / 2)
    nothing = TowardsOrder(orders, kept, ramp=0.0, **{**given, "strength": 0.0, "sparsity": 0.0})
    assert nothing(gated, 1.0).item() == 0.0
    assert nothing.seen is gated
    assert len({TowardsOrder(orders, kept, ramp=r, **given).__qualname__ for r in (0.1, 0.1, 0.2)}) == 2


class Unnormed(nn.Module):
    """No batch norm anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


class Perceptron(nn.Module):
    """A transformer's MLP: (B, N, 12) -> norm, widen, GELU, back, added; then five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(12, 10), nn.LayerNorm(10)
        self.mlp = nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 10))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.mlp(self.norm(x))).mean(1))


def tokens() -> list[tuple[Tensor, Tensor]]:
    return [(image(n, 7, 12, seed=n), torch.arange(n) % 5) for n in (6, 5)]


@pytest.mark.parametrize(
    ("network", "data", "options", "group", "unlike"),
    [
        (Unnormed, batches(), {}, "one", set()),
        (Residual, batches(), {"policy": "tied"}, "conv1", set()),
        (Residual, batches(), {"policy": "tied", "shared": True}, "conv1", set()),
        (Residual, batches(), {"attention": "fbs"}, "layers.0.conv1", {"conv1"}),
        (Mobile, batches(side=16), {"attention": "eca", "tap": "pre"}, "body.0.expand.0", set()),
        (Perceptron, tokens(), {}, "mlp.0", {"embed"}),
    ],
)
def test_networks_of_every_kind(network: Any, data: Any, options: dict[str, Any], group: str, unlike: set[str]) -> None:
    _, outcome = run(network(), data, holdout=data, **options)
    assert group in outcome.statistics["orders"]
    assert not unlike & set(outcome.statistics["orders"])
    assert outcome.plan.groups[group]["kept"] == -(-outcome.plan.groups[group]["size"] // 2)
    small = attrim.apply(outcome.model_to_cut, outcome.plan)
    assert attrim.verify(outcome.model_to_cut, small, outcome.plan, data[0][0]).exact
    found = history(outcome)
    assert set(found.tau) == set(outcome.statistics["orders"])
    assert all(-1 <= v <= 1 for rows in found.tau.values() for v in rows)
    assert isinstance(found.after, MaskAccuracy)
    for why in unlike:
        assert outcome.gates.refused[why]


class Unfoldable(nn.Module):
    """A gate of ``one`` hangs behind a sigmoid, and a constant is added to what it gives: nothing to fold it into."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.head = nn.Sigmoid(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.act(self.one(x)) * 2 + 1).relu().mean((2, 3)))


def test_groups_that_cannot_be_folded_stay_whole_with_the_reason() -> None:
    _, outcome = run(Unfoldable())
    assert set(outcome.statistics["orders"]) == {"two"}
    assert "one" in outcome.gates.refused
    assert "fold" in outcome.gates.refused["one"]
    assert "one" not in {g for g, note in outcome.plan.groups.items() if note["kept"] < note["size"]}
    gates = next(line for line in outcome.log if line["step"] == "gates")
    assert set(gates["refused"]) == {"one"}
    _, dropped = run(Unfoldable(), end="drop")
    assert set(dropped.statistics["orders"]) == {"one", "two"}


class Bare(nn.Module):
    """Channels of a parameter that is used directly, which no gate can hang behind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.conv2d(x, self.weight, padding=1).relu().mean((2, 3)))


def test_a_network_without_a_usable_tap_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="no group can be gated: 'weight'"):
        run(Bare())


def test_any_loss() -> None:
    data = [(x, torch.zeros(len(x), 5)) for x, _ in batches()]
    seen = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(tuple(batch[1].shape))
        return (outputs - batch[1]).square().mean()

    _, outcome = run(data=data, loss=loss)
    assert sorted(seen) == sorted([(6, 5), (6, 5), (3, 5)] * 3)
    assert "masks" not in outcome.statistics["epochs"][-1]
    assert history(outcome).before is None


def test_the_same_seed_gives_the_same_network_and_another_seed_another() -> None:
    one, two, other = (run(seed=seed)[1].model_to_cut.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_prune_score_and_rounds_know_it() -> None:
    model, data = filled(Plain()), batches()
    quick: dict[str, Any] = {"warmup_epochs": 1, "epochs": 1}
    result = attrim.prune(
        model, data[0][0], method="globalpru", budget=Budget(macs=0.5), data=data, recover="free", **quick
    )
    assert result.verification is not None
    assert result.verification.ok
    assert result.after.macs <= 0.5 * result.before.macs
    steps = [s["step"] for s in result.steps]
    assert steps[:7] == ["gates", "gate training", "vote", "gate training", "agreement", "attention", "trained"]
    assert history(result).epochs == (1, 2)
    scores = attrim.score(model, attrim.trace(model, data[0][0]), "globalpru", data, **quick)
    assert sorted(scores.values["conv1"].tolist()) == [(k + 1) / 8 for k in range(8)]
    rounds = attrim.prune_rounds(
        model, data[0][0], method="globalpru", budget=Budget(macs=0.4), rounds=2, data=data, **quick
    )
    assert rounds.after.macs <= 0.4 * rounds.before.macs
    assert [s["round"] for s in rounds.steps if s["step"] == "vote"] == [1, 2]
    assert METHODS["globalpru"].trains


def test_samples_that_say_nothing_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrim.methods.globalpru.run.finetune", lambda gated, *args, **options: gated)
    with pytest.warns(AttrimWarning, match="'conv1', 'conv2' alike, so their order is that of the indices"):
        _, outcome = run(epochs=0)
    assert outcome.statistics["orders"]["conv1"].tolist() == list(range(8))


def test_history_reads_entries_and_refuses_what_is_none() -> None:
    _, outcome = run(monitor=4)
    entries = outcome.statistics["epochs"]
    assert history(entries) == history(outcome)
    _, blind = run(monitor=0)
    with pytest.raises(InputError, match="monitor=256"):
        history(blind)
    with pytest.raises(InputError, match=r"expected what attrim\.prune"):
        history(3)
    _, voted = run(epochs=0)
    assert history(voted).epochs == (1,)
    assert history(voted).after is None


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"ratio": None}, InputError, "how small"),
        ({"ratio": 1.0}, BudgetError, r"in \[0, 1\)"),
        ({"budget": Budget(macs=0.5)}, InputError, "says something else"),
        ({"ratio": None, "budget": Budget(macs=0.0001)}, BudgetError, "cannot be met"),
        ({"vote": "stv"}, InputError, "vote: expected one of pairwise"),
        ({"alloc": "even"}, InputError, "alloc: expected one of uniform, attention"),
        ({"attention": "sca"}, InputError, "attention: expected one of se, eca, fbs"),
        ({"policy": "input_select"}, InputError, "shrinks channels, not what"),
        ({"end": "keep"}, InputError, "end: expected one of fold, drop"),
        ({"ranked": "rank"}, InputError, "ranked: expected one of logits"),
        ({"form": "bpr"}, InputError, "form: expected one of"),
        ({"strength": -1.0}, InputError, "strength: expected a number >= 0"),
        ({"ramp": 1.5}, InputError, r"ramp: expected a number in \[0, 1\]"),
        ({"warmup_epochs": 0}, InputError, "warmup_epochs: expected an int >= 1"),
        ({"revote_every": 2}, InputError, "at most 1, found 2"),
        ({"temperature": 0.0}, InputError, "temperature: expected"),
        ({"samples": 0}, InputError, "samples: expected an int >= 1"),
        ({"lr": -0.1}, InputError, r"lr: expected a number > 0, found -0\.1"),
        ({"warmup_lr": "fast"}, InputError, "warmup_lr: expected a number > 0, found 'fast'"),
        ({"optimizer": "lion"}, InputError, "optimizer: expected 'sgd' or 'adamw'"),
        ({"tap": "behind"}, InputError, "point: expected one of"),
    ],
)
def test_wrong_options_are_named_before_anything_is_trained(
    options: dict[str, Any], kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attrim.methods.globalpru.run.finetune", None)
    with pytest.raises(kind, match=text):
        run(**options)


def test_data_are_needed_and_more_than_once() -> None:
    model = filled(Plain())
    channels = attrim.trace(model, image())
    with pytest.raises(CriterionError, match="there is none"):
        globalpru(model, channels, None, ratio=0.5)
    with pytest.raises(CriterionError, match="found a generator"):
        globalpru(model, channels, iter(batches()), ratio=0.5)
    with pytest.raises(CriterionError, match="has no option 'omegas'"):
        attrim.prune(model, image(), method="globalpru", budget=Budget(macs=0.5), data=batches(), omegas=1)


def test_gates_change_nothing_before_they_learn() -> None:
    model, x = filled(Residual()), image()
    for kind in ("se", "eca", "fbs"):
        for point in ("post", "pre"):
            gates = Gates(model, attrim.trace(model, x), kind, policy="tied", point=point, example=x)  # type: ignore[arg-type]
            with torch.no_grad(), gates.attached(model):
                gated = model(x)
            assert float((gated - model(x)).detach().abs().max()) < 1e-5
