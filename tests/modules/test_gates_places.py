"""Where gates hang, what is refused, and what a network's code can do to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

import attrim
from attrim.errors import InputError
from attrim.modules.gates import Gated, Gates
from nets import Mobile, Plain, Residual, filled, image


class PreActivated(nn.Module):
    """The norm after the stem is read by the block alone; the stem's own output goes on beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn2, self.conv2 = (
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 8, 3, padding=1),
        )
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return self.head(F.relu(x).mean((2, 3)))


class Recalled(nn.Module):
    """One block called twice, with one in-place activation for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 6), (6, 8)))
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for _ in range(2):
            x = self.relu(x + self.conv2(self.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class Direct(nn.Module):
    """A weight that the model itself multiplies by, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 12))
        self.fc, self.head = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc((x @ self.weight.t()).relu()).relu())


def made(model: nn.Module, *shape: int, seen: bool = True, **options: Any) -> tuple[nn.Module, Gates, Tensor]:
    model, x = filled(model).eval().double(), image(*shape).double()
    return model, Gates(model, attrim.trace(model, x), example=x if seen else None, **options), x


def test_policies_and_streams() -> None:
    _, gates, _ = made(Residual(), 2, 3, 16, 16)
    assert gates.streams == {"conv1", "layers.2.conv2", "layers.4.conv2"}
    assert set(gates.refused) == gates.streams
    assert "policy='tied'" in gates.refused["conv1"]
    _, tied, _ = made(Residual(), 2, 3, 16, 16, policy="tied")
    assert tied.refused == {}
    assert [p.module for p in tied.places["conv1"]] == ["bn1", "layers.0.bn2", "layers.1.bn2"]
    _, shared, _ = made(Residual(), 2, 3, 16, 16, policy="tied", shared=True)
    assert len(shared.units) == len(shared.places) < len(tied.units)
    one, other = (shared.gate_of(p) for p in shared.places["conv1"][:2])
    assert one is other


def test_depthwise_layers_carry_on_what_the_expansion_produced() -> None:
    _, gates, _ = made(Mobile(), 2, 3, 32, 32)
    (place,) = gates.places["body.1.expand.0"]
    assert (place.source, place.module) == ("body.1.expand.0", "body.1.expand.2")
    assert place.reading is not None
    assert place.reading.weights == {"body.1.depth.0.weight"}


def test_points() -> None:
    places = {}
    for point in ("post", "pre", "conv"):
        _, gates, _ = made(Mobile(), 2, 3, 32, 32, point=point)
        places[point] = gates.places["body.1.expand.0"][0].module
    assert places == {"post": "body.1.expand.2", "pre": "body.1.expand.1", "conv": "body.1.expand.0"}


def test_a_gate_stands_before_the_output_branches() -> None:
    model, gates, x = made(PreActivated(), 2, 3, 8, 8, policy="tied")
    assert [p.module for p in gates.places["stem"]] == ["stem", "conv2"]
    assert [p.module for p in gates.places["conv1"]] == ["relu"]
    assert gates.streams == {"stem"}
    factors = {"conv1": torch.zeros(6, dtype=torch.float64)}
    with gates.attached(model, fixed=factors):
        masked = model(x)
    stem = model.stem(x)
    assert torch.allclose(masked, model.head(F.relu(stem + model.conv2.bias[:, None, None]).mean((2, 3))))


class Between(nn.Module):
    """Something happens between the layer and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(2 * self.conv(x)).relu().mean((2, 3)))


def test_the_order_of_modules_is_checked_when_nothing_was_watched() -> None:
    model, gates, x = made(Between(), 2, 3, 8, 8, seen=False)
    with (
        gates.attached(model),
        pytest.raises(InputError, match=r"'conv' does not go straight through bn.*example=batch"),
    ):
        model(x)
    model, gates, x = made(Between(), 2, 3, 8, 8)
    assert gates.places["conv"][0].module == "conv"
    with gates.attached(model) as collected:
        model(x)
        assert collected.attention["conv"][0].shape == (2, 8)


def test_a_block_that_runs_twice_is_gated_twice_by_the_same_gate() -> None:
    model, gates, x = made(Recalled(), 2, 3, 8, 8, policy="tied")
    before = model(x)
    with gates.attached(model) as collected, torch.no_grad():
        assert torch.allclose(model(x), before, atol=1e-12)
        assert len(collected.attention["conv1"]) == 2
        assert [p.source for p in collected.places["stem"]] == ["stem", "conv2", "conv2"]
        assert [a.shape for a in collected.attention["conv1"]] == [(2, 6), (2, 6)]
        model(x)
        assert len(collected.attention["conv1"]) == 2  # of the latest pass alone


def test_groups_without_a_usable_tap_are_refused_with_the_reason() -> None:
    _, gates, _ = made(Direct(), 2, 12)
    assert set(gates.places) == {"fc"}
    (reason,) = gates.refused.values()
    assert "used directly" in reason
    with pytest.raises(InputError, match=r"no group can be gated.*used directly"):
        made(Direct(), 2, 12, groups=[next(iter(gates.refused))])
    with pytest.raises(InputError, match="nowhere are no groups of this map"):
        made(Direct(), 2, 12, groups=["nowhere"])


def test_wrong_options() -> None:
    for options, text in (
        ({"kind": "cbam"}, "kind: expected one of se, sigmoid"),
        ({"policy": "all"}, "policy: expected one of internal, tied"),
        ({"point": "act"}, "point: expected one of post, pre, conv"),
        ({"hidden": 0}, "hidden: expected an int >= 1"),
    ):
        with pytest.raises(InputError, match=text):
            made(Plain(), 2, 3, 8, 8, **options)


def test_gates_of_another_network_are_refused() -> None:
    _, gates, _ = made(Residual(), 2, 3, 16, 16)
    with (
        pytest.raises(InputError, match=r"there is no module 'layers.0.conv1'"),
        gates.attached(filled(Plain()).double()),
    ):
        pass


def test_a_plain_sigmoid_begins_at_95_percent_and_sca_needs_training() -> None:
    model, gates, x = made(Plain(), 2, 3, 8, 8, kind="sigmoid")
    for value in gates.features(model, x).values():
        assert torch.allclose(value, torch.sigmoid(torch.tensor(3.0, dtype=torch.float64)), atol=1e-12)
    model, gates, x = made(Plain(), 2, 3, 8, 8, kind="sca", point="conv")
    (unit, *_) = gates.units.values()
    maps = image(2, 8, 5).double()
    weighted = unit.spatial(maps)  # type: ignore[operator]
    assert torch.allclose(weighted, maps * torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    logits, attention = unit(weighted)
    expected = F.group_norm(weighted.mean(2), 4) + F.group_norm(weighted.amax(2), 4)
    assert torch.allclose(logits, expected)
    assert torch.allclose(attention, torch.sigmoid(expected))


def test_spatial_attention_by_hand() -> None:
    _, gates, _ = made(Plain(), 2, 3, 8, 8, kind="sca", point="conv")
    unit: Any = next(iter(gates.units.values()))
    with torch.no_grad():
        unit.spatial_weight.fill_(0.7)
        unit.spatial_bias.fill_(-0.2)
    maps = image(2, 8, 5).double()
    assert unit.groups == 8  # every channel its own group: 16 does not divide 8
    mask = 2 * maps  # largest and mean over one channel
    level = 0.7 * (mask - mask.mean(2, keepdim=True)) / (mask.std(2, keepdim=True) + 1e-5) - 0.2
    assert torch.allclose(unit.spatial(maps), maps * torch.sigmoid(level))


def test_eca_looks_at_neighbours_and_fbs_at_the_input() -> None:
    model, gates, x = made(Plain(), 2, 3, 8, 8, kind="eca")
    unit: Any = gates.gate_of(gates.places["conv2"][0])
    assert unit.weight.shape == (1, 1, 3)  # of 12 channels: log2(12)/2 + 1/2 = 2.3, made odd
    with torch.no_grad():
        unit.weight[0, 0] = torch.tensor([1.0, 0.0, -1.0])
    seen = image(2, 12).double()
    padded = F.pad(seen, (1, 1))
    assert torch.allclose(unit(seen)[0], padded[:, :-2] - padded[:, 2:])
    model, gates, x = made(Plain(), 2, 3, 8, 8, kind="fbs")
    unit = gates.gate_of(gates.places["conv1"][0])
    with torch.no_grad():
        unit.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    with gates.attached(model) as collected:
        model(x)
        expected = x.mean((2, 3)) @ unit.linear.weight.t() + 1
        assert torch.allclose(collected.logits["conv1"][0], expected)
        assert torch.allclose(collected.attention["conv1"][0], expected.relu())


def test_state_travels_as_plain_tensors() -> None:
    model, gates, x = made(Residual(), 2, 3, 16, 16, kind="softmax", seed=3)
    gates.sharpen(2.5)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.add_(0.1)
    _, other, _ = made(Residual(), 2, 3, 16, 16, kind="softmax", seed=4)
    other.load_state_dict(load(save(gates.state_dict())))
    one, two = (g.features(model, x) for g in (gates, other))
    assert all(torch.equal(one[group], two[group]) for group in one)
    assert not any(name.startswith(("conv", "layers")) for name in gates.state_dict())


def test_a_gated_network_is_a_module_that_can_be_copied_and_called_like_its_base() -> None:
    model, gates, x = made(Plain(), 2, 3, 8, 8)
    gated = Gated(model, gates, frozen=True)
    assert torch.allclose(gated(x=x), model(x))
    assert gated.collected is not None
    assert gated.collected.attention["conv1"][0].requires_grad
    twin = copy.deepcopy(gated)
    assert twin.collected is None
    assert torch.equal(twin(x), gated(x))
    assert list(gated.release().attention) == ["conv1", "conv2"]
    with pytest.raises(InputError, match="nothing was collected"):
        gated.release()


def test_seeds_decide_the_gates_and_leave_other_randomness_alone() -> None:
    model, one, x = made(Plain(), 2, 3, 8, 8, seed=1)
    channels = attrim.trace(model, x)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Gates(model, channels, example=x)
    assert torch.equal(torch.rand(3), expected)
    _, two, _ = made(Plain(), 2, 3, 8, 8, seed=1)
    _, three, _ = made(Plain(), 2, 3, 8, 8, seed=2)
    a, b, c = (next(g.parameters()) for g in (one, two, three))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
