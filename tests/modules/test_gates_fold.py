"""Folding: the network without gates computes what the gated one computes, or the group is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import InputError
from attrim.modules.gates import Gates
from nets import Attention, Mobile, Plain, Residual, filled, image


class Bare(nn.Module):
    """Convolutions with biases and without norms, an average pool, and a flattened linear layer (16 columns a channel)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv1, self.act = nn.Conv2d(3, 6, 3, padding=1), activation
        self.conv2, self.pool = nn.Conv2d(6, 7, 3, padding=1), nn.AvgPool2d(4)
        self.head = nn.Linear(7 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.tanh(self.conv2(self.act(self.conv1(x))))).flatten(1))


class Tokens(nn.Module):
    """A transformer's two layers on tokens ``(B, N, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Excited(nn.Module):
    """Squeeze and excite: two layers produce one group's channels, and nothing is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.down, self.up, self.sigmoid = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        scale = self.sigmoid(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))
        return self.head((x * scale).mean((2, 3)))


def made(model: nn.Module, x: Tensor, *, seen: bool = True, **options: object) -> tuple[nn.Module, Gates, Tensor]:
    model, x = filled(model).eval().double(), x.double()
    return model, Gates(model, attrim.trace(model, x), example=x if seen else None, **options), x  # type: ignore[arg-type]


def factors(gates: Gates, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        group: 0.2 + 1.6 * torch.rand(len(places[0].index), generator=generator, dtype=torch.float64)
        for group, places in gates.places.items()
    }


def same(model: nn.Module, gates: Gates, x: Tensor, attention: dict[str, Tensor]) -> None:
    with torch.no_grad():
        with gates.attached(model, fixed=attention):
            expected = model(x)
        folded = gates.fold(model, attention)
        assert torch.allclose(folded(x), expected, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(model(x), expected, atol=1e-4)
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("point", ["post", "pre", "conv"])
@pytest.mark.parametrize(("network", "policy"), [(Plain, "tied"), (Residual, "tied"), (Mobile, "internal")])
def test_convolutional_networks_fold_exactly(network: type[nn.Module], policy: str, point: str) -> None:
    model, gates, x = made(network(), image(2, 3, 16, 16), policy=policy, point=point)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same(model, gates, x, factors(gates))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(6), nn.SiLU(), nn.ReLU6(), nn.Identity()]
)
def test_without_norms_into_weights_and_biases_or_into_what_reads(activation: nn.Module) -> None:
    model, gates, x = made(Bare(activation), image(2, 3, 16, 16))
    same(model, gates, x, factors(gates))
    folded = gates.fold(model, {"conv1": factors(gates)["conv1"]})
    own = isinstance(activation, (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity))
    assert torch.equal(folded.conv1.weight, model.conv1.weight) is not own
    assert torch.equal(folded.conv2.weight, model.conv2.weight) is own
    assert torch.equal(folded.conv2.bias, model.conv2.bias)


def test_many_positions_of_a_channel_take_one_factor() -> None:
    """Read behind a flattening, each channel is 16 columns."""
    model, gates, _ = made(Bare(nn.ReLU()), image(2, 3, 16, 16))
    ones = torch.ones(7, dtype=torch.float64)
    ones[3] = 0.0
    folded = gates.fold(model, {"conv2": ones})
    assert torch.equal(folded.conv2.weight[3], torch.zeros_like(folded.conv2.weight[3]))
    assert folded.conv2.bias[3].item() == 0
    assert torch.equal(folded.conv2.weight[4], model.conv2.weight[4])


def test_tokens_have_their_channels_last() -> None:
    model, gates, x = made(Tokens(), image(2, 7, 6), groups=["fc1"])
    (place,) = gates.places["fc1"]
    assert (place.module, place.dim) == ("act", 2)
    with gates.attached(model) as collected:
        model(x)
        pooled = collected.pooled["fc1"][0]
        assert torch.allclose(pooled, model.act(model.fc1(model.norm(x))).mean(1))
    same(model, gates, x, factors(gates))
    folded = gates.fold(model, factors(gates))
    assert torch.equal(folded.fc1.weight, model.fc1.weight)  # GELU is not homogeneous: fc2 takes the factors
    assert torch.equal(folded.fc2.bias, model.fc2.bias)


def test_heads_are_channels_of_several_positions() -> None:
    model, gates, x = made(Attention(), image(2, 5, 12), groups=["qkv"])
    (place,) = gates.places["qkv"]
    assert place.index.shape == (4, 18)
    with gates.attached(model) as collected, torch.no_grad():
        model(x)
        whole = model.qkv(model.embed(x)).mean(1)
        expected = torch.stack([whole[:, list(row)].mean(1) for row in place.index], 1)
        assert torch.allclose(collected.pooled["qkv"][0], expected)
    same(model, gates, x, factors(gates))


def test_squeeze_and_excite_is_no_stream_and_its_sigmoid_cannot_be_folded() -> None:
    model, gates, x = made(Excited(), image(2, 3, 8, 8))
    assert gates.streams == frozenset()
    assert [p.module for p in gates.places["conv"]] == ["act", "sigmoid"]
    with pytest.raises(InputError, match=r"'conv': 'sigmoid' \(Sigmoid\) is not linear .* goes through 'mul'"):
        gates.fold(model, factors(gates))
    attention = factors(gates)
    folded = gates.fold(model, attention, skip=True)
    with gates.attached(model, fixed={"down": attention["down"]}):
        assert torch.allclose(folded(x), model(x), atol=1e-12)


def test_without_an_example_what_reads_is_not_known() -> None:
    model, gates, _ = made(Bare(nn.SiLU()), image(2, 3, 16, 16), seen=False)
    with pytest.raises(InputError, match=r"make the gates with Gates\(\.\.\., example=batch\)"):
        gates.fold(model, {"conv1": torch.ones(6)})


class Twins(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = (nn.Conv2d(n, 6, 1, bias=False) for n in (3, 6, 6))
        self.two.weight = self.one.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.first(x)).relu()).relu().mean((2, 3)))


def test_a_weight_with_two_users_is_not_scaled_for_one_of_them() -> None:
    model, gates, _ = made(Twins(), image(2, 3, 8, 8), policy="tied")
    assert list(gates.places) == ["first"]
    with pytest.raises(InputError, match=r"'one.weight' is computed, or is used elsewhere too"):
        gates.fold(model, factors(gates))


def test_a_stream_behind_an_activation_that_is_not_homogeneous_is_refused() -> None:
    model, gates, x = made(Mobile(), image(2, 3, 16, 16), policy="tied")
    attention = factors(gates)
    with pytest.raises(InputError, match=r"1 of 9 groups .*'stem.0': 'stem.2' \(ReLU6\) .* goes through 'add'"):
        gates.fold(model, attention)
    folded = gates.fold(model, attention, skip=True)
    del attention["stem.0"]
    with gates.attached(model, fixed=attention):
        assert torch.allclose(folded(x), model(x), atol=1e-9)


@pytest.mark.parametrize(
    "wrong", [torch.ones(3), -torch.ones(8), torch.full((8,), float("nan"))], ids=["shape", "negative", "nan"]
)
def test_wrong_factors(wrong: Tensor) -> None:
    model, gates, _ = made(Plain(), image(2, 3, 8, 8))
    with pytest.raises(InputError, match="expected 8 finite factors >= 0 for group 'conv1'"):
        gates.fold(model, {"conv1": wrong})
    with pytest.raises(InputError, match="'nothing' has no gates"):
        gates.fold(model, {"nothing": wrong})
