"""Reading attention: one pass, whatever the batches, the processes and the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import CriterionError, DataError
from attrim.methods.attention import read_attention
from attrim.modules.gates import Gates
from nets import Plain, Residual, filled, image


def made(model: nn.Module, x: Tensor) -> tuple[nn.Module, Gates]:
    model = filled(model).eval().double()
    gates = Gates(model, attrim.trace(model, x), policy="tied", example=x, seed=2)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(7))
    return model, gates


def labelled(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(image(n, 3, 8, 8, seed=i).double(), torch.arange(n) % 5) for i, n in enumerate(sizes)]


def test_two_processes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled((4, 4, 3, 2))
    model, gates = made(Plain(), data[0][0])
    with torch.no_grad():
        model.bn1.weight[4] = model.bn1.bias[4] = 0.0  # dead in both
    whole = read_attention(model, gates, data)
    told: list[Tensor] = []
    monkeypatch.setattr("attrim.methods.attention.all_sum", lambda *tensors: told.extend(t.clone() for t in tensors))
    read_attention(model, gates, data[1::2])
    waiting = iter(told)

    def add(*tensors: Tensor) -> None:
        for tensor in tensors:
            tensor += next(waiting)

    monkeypatch.setattr("attrim.methods.attention.all_sum", add)
    both = read_attention(model, gates, data[::2])
    assert both.samples == whole.samples == 13
    for name in ("mean", "second", "by_class", "alive"):
        for group, value in getattr(whole, name).items():
            assert torch.allclose(
                getattr(both, name)[group].double(), value.double(), atol=1e-12, rtol=0, equal_nan=True
            )
    assert not whole.alive["conv1"][0, 4]
    assert int(whole.alive["conv1"].sum()) < 8


def test_branches_of_a_stream_are_kept_apart_and_reduced_at_the_end() -> None:
    data = labelled((3, 2))
    model, gates = made(Residual(widths=(4, 8), blocks=1), data[0][0])
    found = read_attention(model, gates, [(x, y) for x, y in data])
    places = gates.places["conv1"]
    assert found.mean["conv1"].shape == (len(places), 4) == (2, 4)
    each = gates.features(model, torch.cat([x for x, _ in data]))["conv1"]
    assert torch.allclose(found.mean["conv1"], each.mean(1), atol=1e-12)
    alive = found.alive["conv1"]
    expected = torch.where(alive, found.mean["conv1"], 0.0)
    assert torch.equal(found.score()["conv1"], expected.mean(0))
    assert torch.equal(found.score("max")["conv1"], expected.amax(0))


def test_the_network_is_as_before() -> None:
    data = labelled((3, 2))
    model, gates = made(Plain(), data[0][0])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = gates.features(model, data[0][0])
    found = read_attention(model, gates, data[:1])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for group, value in expected.items():  # overwriting outputs on the way changes no value
        assert torch.allclose(found.mean[group], value.mean(1), atol=1e-12)


def test_samples_stop_the_pass_and_labels_may_be_missing() -> None:
    data = [x for x, _ in labelled((4, 4, 4))]
    model, gates = made(Plain(), data[0])
    found = read_attention(model, gates, data, samples=5)
    assert found.samples == 8
    assert found.by_class == {}
    assert found.class_counts is None
    pixelwise = [(x, torch.zeros(4, 8, 8, dtype=torch.long)) for x in data]
    assert read_attention(model, gates, pixelwise).by_class == {}


def test_no_data_and_wrong_data() -> None:
    data = labelled((3,))
    model, gates = made(Plain(), data[0][0])
    with pytest.raises(CriterionError, match="yielded no sample"):
        read_attention(model, gates, [])
    with pytest.raises(DataError, match="the model failed on a batch"):
        read_attention(model, gates, [torch.zeros(2, 4, 8, 8).double()])
    assert not any(module._forward_hooks for module in model.modules())
