"""Gates: the identity at the beginning, nothing left behind, the right places, one value for each sample and channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import InputError
from attrim.modules.gates import Gates
from nets import Mobile, Plain, Residual, filled, image

NETWORKS = {"plain": Plain, "residual": Residual, "mobile": Mobile}
IDENTITIES = ("se", "eca", "fbs", "softmax")


def made(network: type[nn.Module] = Residual, kind: str = "se", **options: Any) -> tuple[nn.Module, Gates, Tensor]:
    model, x = filled(network()).eval().double(), image(3, 3, 16, 16).double()
    return model, Gates(model, attrim.trace(model, x), kind, **{"example": x, **options}), x  # type: ignore[arg-type]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def shuffled(gates: Gates, seed: int = 0) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return gates


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", IDENTITIES)
@pytest.mark.parametrize("point", ["post", "pre", "conv"])
def test_gates_change_nothing_at_the_beginning(name: str, kind: str, point: str) -> None:
    model, gates, x = made(NETWORKS[name], kind, policy="tied", point=point)
    before = model(x)
    with gates.attached(model) as collected:
        after = model(x)
        assert set(collected.attention) == set(gates.places)
        assert all(torch.allclose(a, torch.ones_like(a), atol=1e-12) for v in collected.attention.values() for a in v)
    assert float((before - after).detach().abs().max()) < 1e-12
    assert torch.equal(model(x), before)
    assert hooks(model) == 0


def test_the_model_keeps_its_class_its_tensors_and_its_names() -> None:
    model, gates, x = made()
    kind, before = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    with gates.attached(model):
        assert type(model) is kind
        assert list(model.state_dict()) == list(before)
        model(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in gates.parameters())


def test_a_failed_forward_and_a_nested_block_leave_no_hook() -> None:
    model, gates, x = made()
    with pytest.raises(RuntimeError), gates.attached(model):
        model(x[:, :2])
    assert hooks(model) == 0
    with gates.attached(model), pytest.raises(InputError, match="attached already"), gates.attached(model):
        pass
    assert hooks(model) == 0
    with gates.attached(model) as collected:
        model(x)
        assert len(collected.attention) == len(gates.places)
    assert collected.attention == {}


def test_each_sample_has_its_own_attention() -> None:
    """Values by hand: mean over places, two layers, twice the sigmoid, times the features of that sample alone."""
    model, gates, x = made(Plain, point="post")
    shuffled(gates)
    place = gates.places["conv1"][0]
    assert (place.source, place.chain, place.module) == ("conv1", ("bn1",), "bn1")  # relu is a function here
    with gates.attached(model) as collected, torch.no_grad():
        together = model(x)
        logits, attention = collected.logits["conv1"][0], collected.attention["conv1"][0]
        assert attention.shape == (3, 8)
    with torch.no_grad():
        unit = gates.gate_of(place)
        pooled = model.bn1(model.conv1(x)).mean((2, 3))
        expected = unit.second(torch.relu(unit.first(pooled)))
        assert torch.allclose(logits, expected, atol=1e-12)
        assert torch.allclose(attention, 2 * torch.sigmoid(expected), atol=1e-12)
        with gates.attached(model):
            alone = torch.cat([model(sample[None]) for sample in x])
    assert torch.allclose(together, alone, atol=1e-10)
    assert not torch.allclose(together, model(x), atol=1e-3)
