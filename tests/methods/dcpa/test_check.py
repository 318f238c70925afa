"""Branches that a policy drops: how likely that is at first, when it is decided, and whether they had better stay."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made import made
from torch import Tensor

import attrim
from attrim.errors import AttrimWarning, BudgetError, CheckpointError, InputError
from attrim.methods.dcpa import dcpa
from attrim.methods.dcpa.check import checked
from attrim.methods.dcpa.derive import Derived, repair
from attrim.methods.dcpa.judge import Judge, Verdict
from attrim.methods.dcpa.levels import by_threshold
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.sample import decided
from attrim.recover import evaluate, recalibrate
from attrim.search.limits import limits_of
from nets import Residual, filled

HALF = attrim.Budget(macs=0.5)


def batches(count: int = 4, size: int = 12, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


def leaning(policy: Policy, names: Sequence[str], by: float = 6.0) -> None:
    """Make a policy drop these branches."""
    with torch.no_grad():
        for u, unit in enumerate(policy.space.units):
            policy.theta[u, 0] += by * (unit.branch in names)


# How likely a drop is, and when it is decided


def test_a_branch_goes_when_that_is_likelier_than_not() -> None:
    """Not when it is merely likelier than each single width."""
    p = torch.tensor([[0.4, 0.2, 0.1, 0.3], [0.6, 0.1, 0.1, 0.2], [0.4, 0.2, 0.1, 0.3]])
    found = decided(p.log(), torch.tensor([True, True, False]))
    assert found.argmax(1).tolist() == [3, 0, 0]
    assert found[0].exp().tolist() == pytest.approx([0.4, 0.4, 0.2, 0.6])
    assert found[2].exp().tolist() == pytest.approx(p[2].tolist())


@pytest.mark.parametrize("kind", ["se", "free", "xattn"])
@pytest.mark.parametrize("by_channel", [False, True])
def test_the_prior_is_the_probability_of_each_drop_at_first(kind: str, by_channel: bool) -> None:
    m = made(Residual(), drop=True, kind=kind, by_channel=by_channel)
    for start in ("noise", "wide"):
        for prior in (0.02, 0.3):
            policy = Policy(m.space, m.prices, m.policy.ranks, kind, start=start, drop_prior=prior)  # type: ignore[arg-type]
            p = policy.log_probabilities().exp()[policy.drop, 0]
            assert len(p)
            assert torch.allclose(p, torch.full_like(p, prior), rtol=0.15)
            assert float(policy.theta.detach().abs().max()) < (
                4 if start == "wide" else 0.1
            )  # weight decay leads to the prior
    assert int((m.policy.decided()[m.policy.drop] == 0).sum()) == 0


def test_the_random_control_has_no_prior() -> None:
    m = made(Residual(), drop=True, kind="random")
    assert float(m.policy.prior.abs().max()) == 0


def test_branches_that_have_to_stay_are_not_dropped_by_the_repair() -> None:
    m = made(Residual((32, 64, 128)), drop=True)
    names = [u.branch for u in m.space.units if u.branch is not None]
    leaning(m.policy, names, 12.0)
    for share in (0.5, 0.3):
        limits = limits_of(m.channels.cost, attrim.Budget(macs=share))
        prices, log_p = Prices(m.space, limits), m.policy.log_probabilities()
        for stay in ((), names[:1], names):
            found = repair(m.space, prices, log_p, limits, stay=stay)
            assert not set(found.drops) & set(stay)
            assert 0 <= found.slack <= 0.01
            assert bool(found.drops) is (len(stay) < len(names))
    m = made(Residual((32, 64, 128)), drop=True, ratios=(0.5,))
    limits = limits_of(m.channels.cost, attrim.Budget(macs=0.2))
    prices, log_p = Prices(m.space, limits), m.policy.log_probabilities()
    assert repair(m.space, prices, log_p, limits).drops
    with pytest.raises(BudgetError, match="with its branches"):
        repair(m.space, prices, log_p, limits, stay=names)


def test_branches_that_have_to_stay_are_not_dropped_by_the_threshold() -> None:
    m = made(Residual((32, 64, 128)), drop=True, by_channel=True)
    names = [u.branch for u in m.space.units if u.branch is not None]
    logits = {g: torch.zeros(m.channels[g].size) for g in m.space.gated}
    keep = torch.full((len(names),), -1.0)
    limits = limits_of(m.channels.cost, HALF)
    assert by_threshold(m.space, limits, logits, keep).drops
    assert names[0] not in by_threshold(m.space, limits, logits, keep, names[:1]).drops
    assert not by_threshold(m.space, limits, logits, keep, names).drops
    m = made(Residual((32, 64, 128)), drop=True, by_channel=True, budget=attrim.Budget(macs=0.5, min_keep=0.5))
    tight = limits_of(m.channels.cost, attrim.Budget(macs=0.2))
    assert by_threshold(m.space, tight, logits, keep).drops
    with pytest.raises(BudgetError, match="while these branches stay"):
        by_threshold(m.space, tight, logits, keep, names)


# The check


class Losses(Judge):
    """Judges by a table: the loss of each set of drops."""

    def __init__(self, table: dict[str, float], file: Path | None = None) -> None:
        super().__init__(torch.nn.Identity(), [], [], None, file=file)
        self.table, self.asked = table, 0

    def __call__(self, plan: Any) -> Verdict:
        self.asked += 1
        loss = self.table[plan.drops]
        return Verdict(loss, 1 / (1 + loss))


def proposing(policy: str, refused: str = "") -> Any:
    """Plans that drop the letters of ``policy`` but for those that stay."""

    def propose(stay: Sequence[str]) -> Any:
        drops = "".join(b for b in policy if b not in stay)
        if refused and len(drops) < len(refused):
            raise BudgetError("too dear")
        return SimpleNamespace(drops=drops), Derived((), {}, tuple(drops), 0, 0.0)

    return propose


@pytest.mark.parametrize(
    ("table", "dropped", "taken", "judged"),
    [
        ({"ab": 1.0, "": 2.0, "b": 3.0, "a": 3.0}, "ab", "policy", 4),
        ({"ab": 1.0, "": 0.5, "b": 3.0, "a": 3.0}, "", "none", 4),
        ({"ab": 1.0, "": 0.9, "b": 0.5, "a": 3.0}, "b", "some", 4),
        ({"ab": 1.0, "": 0.9, "b": 3.0, "a": 0.5}, "a", "some", 4),
        ({"ab": 1.0, "": 1.0, "b": 1.0, "a": 1.0}, "ab", "policy", 4),
        ({"ab": math.inf, "": 9.0, "b": math.inf, "a": math.inf}, "", "none", 4),
        ({"a": 1.0, "": 2.0}, "a", "policy", 2),
        ({"a": 1.0, "": 0.5}, "", "none", 2),
    ],
)
@pytest.mark.filterwarnings("ignore::attrim.errors.AttrimWarning")
def test_the_network_with_the_lowest_loss_is_taken(
    table: dict[str, float], dropped: str, taken: str, judged: int
) -> None:
    policy = max(table, key=len)
    judge = Losses(table)
    plan, derived = checked(proposing(policy), list(policy), judge, HALF, True)
    assert plan.drops == dropped
    assert derived.check is not None
    assert derived.check["taken"] == taken
    assert derived.check["dropped"] == list(dropped)
    rows = derived.check["compared"]
    assert judge.asked == judged == len(rows)
    first, whole = rows[:2]
    assert (first["drops"], whole["drops"]) == (list(policy), [])
    assert whole["loss"] == table[""]
    assert whole["accuracy"] == 1 / (1 + table[""])
    assert json.loads(json.dumps(derived.check)) == derived.check


def test_a_policy_that_drops_nothing_is_not_judged() -> None:
    judge = Losses({})
    _, derived = checked(proposing(""), ["a"], judge, HALF, True)
    assert derived.check is None


def test_a_budget_that_needs_drops_says_so_and_takes_the_best_of_them() -> None:
    judge = Losses({"ab": 1.0, "b": 0.5, "a": 0.7})
    with pytest.warns(
        AttrimWarning, match=r"drops 'b' \(accuracy 66\.7%, loss 0\.5000 against accuracy 50\.0%, loss 1"
    ):
        plan, derived = checked(proposing("ab", refused="x"), ["a", "b"], judge, HALF, True)
    assert plan.drops == "b"
    assert derived.check is not None
    assert derived.check["compared"][1] == {"stay": ["a", "b"], "refused": "too dear"}


def test_a_decision_is_kept_for_each_budget(tmp_path: Path) -> None:
    file = tmp_path / "run" / "drops.json"
    one, later = Losses({"a": 1.0, "": 0.5}, file), Losses({}, file)
    for judge, budget, asked in (
        (one, HALF, 2), (one, HALF, 2), (one, attrim.Budget(macs=0.3), 4), (one, HALF, 4), (later, HALF, 0),
    ):  # fmt: skip
        with pytest.warns(AttrimWarning, match="drop_check=False"):
            plan, derived = checked(proposing("a"), ["a"], judge, budget, True)
        assert (plan.drops, judge.asked) == ("", asked)
        assert derived.check is not None
        assert derived.check["taken"] == "none"
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        checked(proposing("a"), ["a"], Losses({}, file), HALF, True)


# The judge


def test_a_verdict_is_the_loss_and_accuracy_of_the_cut_network() -> None:
    model, data, other = filled(Residual()).eval(), batches(), batches(3, 7, seed=1)
    channels = attrim.trace(model, data[0][0])
    plan = attrim.allocate(channels, attrim.score(model, channels, "l2"), HALF)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for limit in (0, 4):
        small = attrim.apply(model, plan).eval()
        small = recalibrate(small, data, limit=limit) if limit else small
        with torch.no_grad():
            expected = torch.stack([F.cross_entropy(small(x), y) for x, y in other]).mean()
        found = Judge(model, data, other, None, limit)(plan)
        assert found.loss == pytest.approx(float(expected), rel=1e-5)
        assert found.accuracy == pytest.approx(evaluate(small, other))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    own = Judge(model, data, other, lambda outputs, batch: outputs.sum() * float("nan"))(plan)
    assert own.loss == math.inf


def test_networks_are_judged_on_the_same_batches() -> None:
    """Also where a loader shuffles with a generator of its own."""
    from torch.utils.data import DataLoader, TensorDataset

    model, (images, labels) = filled(Residual()), batches(1, 40)[0]
    channels = attrim.trace(model, images)
    plan = attrim.allocate(channels, attrim.score(model, channels, "l2"), HALF)
    rows = DataLoader(
        TensorDataset(images, labels), 8, shuffle=True, generator=torch.Generator().manual_seed(0), drop_last=True
    )
    seen: list[Tensor] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(batch[1])
        return F.cross_entropy(outputs, batch[1])

    judge = Judge(model, batches(1), rows, loss)
    first, second = judge(plan), judge(plan)
    assert first == second
    half = len(seen) // 2
    assert half == 5
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


# The method


@pytest.mark.filterwarnings("ignore::attrim.errors.AttrimWarning")
@pytest.mark.parametrize("space", ["width", "channel"])
def test_a_search_judges_its_drops_for_every_budget(space: str, tmp_path: Path) -> None:
    model, data = filled(Residual((16, 32))), batches()
    channels = attrim.trace(model, data[0][0])
    options: dict[str, Any] = {"budget": HALF, "epochs": 1, "drop_prior": 0.9, "space": space, "warmup": 0.0}
    outcome = dcpa(model, channels, data, folder=tmp_path / "run", **options)
    searched, derived = outcome.statistics["searched"], outcome.statistics["derived"]
    bare = dcpa(model, channels, data, drop_check=False, **options).statistics
    assert bare["searched"].judge is None
    assert bare["derived"].check is None
    assert derived.check["policy"] == list(bare["derived"].drops) != []
    assert derived.check["dropped"] == list(derived.drops)
    losses = {tuple(row["drops"]): row["loss"] for row in derived.check["compared"]}
    assert losses[derived.drops] == min(losses.values())
    assert outcome.log[-1]["check"] == derived.check
    other = searched.plan(attrim.Budget(macs=0.7))[1]
    assert other.check is None or other.check["compared"] != derived.check["compared"]
    again = dcpa(model, channels, data, folder=tmp_path / "run", resume=True, **options)
    assert again.statistics["derived"].check == derived.check
    assert again.plan.cuts == outcome.plan.cuts
    plain = dcpa(model, channels, data, folder=tmp_path / "run", resume=True, drop_check=False, **options)
    assert plain.statistics["derived"].drops == bare["derived"].drops


@pytest.mark.parametrize("value", [0, 1, -0.1, True, "2%"])
def test_a_prior_out_of_its_range_is_refused(value: Any) -> None:
    model = filled(Residual())
    channels = attrim.trace(model, batches()[0][0])
    with pytest.raises(InputError, match="drop_prior: expected a probability in"):
        dcpa(model, channels, batches(), budget=HALF, drop_prior=value)
