"""The policy: what has a gradient, what has not, and what each kind is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from made import made

from attrim.methods.dcpa.objective import cost_term
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.report import describe, explain
from attrim.methods.dcpa.supernet import Supernet
from nets import Mobile, Residual


@pytest.mark.parametrize("kind", ["se", "xattn", "free"])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("what", ["task", "cost"])
def test_every_tensor_of_the_policy_has_a_gradient(kind: str, by_channel: bool, what: str) -> None:
    m = made(Residual(), drop=True, kind=kind, by_channel=by_channel)
    supernet, model = Supernet(m.model, m.space), m.model.requires_grad_(False)
    for seed in range(12 if what == "task" else 1):  # a branch that is dropped hides its widths for one draw
        if what == "task":
            with supernet.masked(m.policy.sample(1.0, torch.Generator().manual_seed(seed))):
                F.cross_entropy(model(m.x), torch.tensor([0, 1])).backward()
        else:
            costs = m.policy.expected()
            cost_term("abslog", costs, m.policy.likeliest(), m.prices.bounds, m.prices.whole).backward()
    for name, parameter in m.policy.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert float(parameter.grad.abs().sum()) > 0, name
    valid = m.policy.valid
    if what == "cost" and not by_channel:
        assert bool((m.policy.theta.grad[valid] != 0).all())
        assert bool((m.policy.theta.grad[~valid] == 0).all())


def test_free_has_no_attention_and_the_descriptor_is_no_parameter() -> None:
    sizes = {
        k: {n for n, _ in made(Mobile(), side=16, kind=k).policy.named_parameters()} for k in ("free", "se", "xattn")
    }
    assert sizes["free"] == {"theta", "open"}
    assert sizes["free"] < sizes["se"]
    assert sizes["free"] < sizes["xattn"]
    policy = made(Mobile(), side=16).policy
    assert "z" in dict(policy.named_buffers())
    assert not policy.z.requires_grad


def test_attention_changes_the_logits_with_the_descriptor_and_free_does_not() -> None:
    for kind in ("se", "xattn", "free"):
        policy = made(Residual(), kind=kind).policy
        before = policy.logits().detach().clone()
        policy.z.add_(1.0)
        assert torch.equal(policy.logits(), before) is (kind == "free")
    policy = made(Residual(), kind="xattn").policy  # one layer's descriptor reaches every layer
    before = policy.logits().detach().clone()
    policy.z[: m_size(policy, 0)] += 1.0
    assert bool((policy.logits() != before).any(1).all())
    policy = made(Residual(), kind="se").policy  # and here its own layer alone
    before = policy.logits().detach().clone()
    policy.z[: m_size(policy, 0)] += 1.0
    assert (policy.logits() != before).any(1).tolist() == [True] + [False] * (len(before) - 1)


def m_size(policy: object, unit: int) -> int:
    return policy.space.slices()[unit].stop  # type: ignore[attr-defined,no-any-return]


def test_the_descriptor_is_a_moving_average_and_at_the_end_the_mean_of_the_epoch() -> None:
    policy = made(Residual()).policy
    policy.seen.zero_()
    policy.settle(False)
    ones = torch.ones_like(policy.z)
    policy.observe(ones)
    assert torch.equal(policy.z, ones)
    policy.observe(3 * ones)
    assert torch.allclose(policy.z, 1.2 * ones)
    policy.observe(torch.full_like(ones, torch.nan))
    assert torch.allclose(policy.z, 1.2 * ones)
    policy.settle(True)
    assert torch.allclose(policy.z, (1 + 3 + 1.2) / 3 * ones)


def test_layers_of_one_size_are_computed_together_as_each_alone() -> None:
    policy = made(Residual(), kind="se").policy
    information, z = policy.information, policy.z
    assert information is not None
    added = information(z)
    for stack, layers in zip(information.stacks, information._layers, strict=True):
        for row, layer in enumerate(layers):
            part = z[information.parts[layer]]
            inner = (stack.squeeze[row] @ part + stack.squeeze_bias[row]).relu()
            attention = (stack.excite[row] @ inner + stack.excite_bias[row]).sigmoid()
            assert torch.allclose(stack.out[row] @ attention, added[layer], atol=1e-6)


def test_what_is_reported() -> None:
    m = made(Residual(), drop=True)
    found = describe(m.policy)
    assert found["target"] == pytest.approx({"macs": 0.5}, abs=1e-6)
    assert set(found["widths"]) == set(m.space.groups)
    assert all(sum(p) == pytest.approx(1, abs=1e-4) for p in found["probabilities"].values())
    best = {u.name: max(range(len(u)), key=found["probabilities"][u.name].__getitem__) for u in m.space.units}
    assert found["dropped"] == [u.branch for u in m.space.units if u.branch and best[u.name] == 0]
    assert all(found["widths"][u.groups[0]] == u.widths[best[u.name], 0] for u in m.space.units)
    told = explain(m.policy)
    assert all(0 < v < 1 for values in told["attention"].values() for v in values)
    layers = torch.tensor(explain(made(Residual(), kind="xattn").policy)["layers"])
    assert torch.allclose(layers.sum(1), torch.ones(len(layers)))


def test_a_policy_survives_the_disk() -> None:
    m = made(Residual(), kind="se", seed=1)
    other = made(Residual(), kind="se", seed=2)
    other.policy.load_state_dict(m.policy.state_dict())
    assert torch.equal(other.policy.logits(), m.policy.logits())


def test_balanced_attention_moves_a_logit_no_faster_than_a_free_parameter() -> None:
    """One step of Adam, all on one loss: the sum of the last candidates' logits."""
    moved = {}
    for kind, balanced in (("free", False), ("se", False), ("se", True), ("xattn", False), ("xattn", True)):
        m = made(Residual((32, 64, 128)), kind=kind)
        policy = Policy(m.space, m.prices, m.policy.ranks, kind, balanced=balanced)  # type: ignore[arg-type]
        policy.observe(torch.rand(m.space.size, generator=torch.Generator().manual_seed(0)))
        adam = torch.optim.Adam(policy.parameters(), lr=0.01)
        before = policy.logits()[:, -1].detach()
        policy.logits()[:, -1].sum().backward()
        adam.step()
        moved[kind, balanced] = float((before - policy.logits()[:, -1].detach()).mean())
    assert moved["free", False] == pytest.approx(0.01, rel=1e-3)
    assert moved["se", False] > 0.1
    assert moved["xattn", False] > 0.1
    assert 0.01 < moved["se", True] < 0.03
    assert 0.01 < moved["xattn", True] < 0.03


def test_steady_draws_drop_what_is_likelier_to_go_than_to_stay_and_nothing_else() -> None:
    m = made(Residual(), drop=True)
    branches = [u for u, unit in enumerate(m.space.units) if unit.branch is not None]
    with torch.no_grad():
        m.policy.theta[branches[0], 0] += 6.0
    seen = set()
    for seed in range(40):
        draw = m.policy.sample(1.0, torch.Generator().manual_seed(seed))
        steady = m.policy.steady(draw)
        assert torch.equal(steady.mask, draw.mask)
        assert not steady.gates.requires_grad
        assert steady.gates.tolist() == [float(u != branches[0]) for u in range(len(m.space.units))]
        seen.add(tuple(draw.gates.tolist()))
    assert len(seen) > 1
