"""arpruning: the closed form against the loop it replaces, and what the definition promises."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import AttrimWarning, CriterionError
from attrim.score import score
from attrim.score.attention_map import left_out
from nets import Residual, filled, image


def naive(maps: Tensor, p: int = 2) -> Tensor:
    """γ of every channel, one at a time, as the definition says it; ``maps`` has shape (B, C, H, W)."""
    energy = maps.double().abs().pow(p).flatten(2)
    images, width, pixels = energy.shape
    gamma = []
    for j in range(width):
        rest = energy[:, [c for c in range(width) if c != j]].sum(1)
        whole = energy.sum(1)
        q = whole / whole.norm(dim=1, keepdim=True).clamp_min(1e-300)
        q_rest = rest / rest.norm(dim=1, keepdim=True).clamp_min(1e-300)
        gamma.append((q - q_rest).square().sum() / (images * pixels))
    return torch.stack(gamma)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def shown(build):
    """A channel map of an identity, so that the maps are the data themselves."""

    def make(width: int, kind: str = "norm", dim: int = 1, index=None):
        model = nn.Sequential(nn.Identity())
        model.w = nn.Parameter(torch.zeros(width))
        index = width if index is None else index
        group = build.group("g", [build.member("w:0", index, "out")], [build.tap("0", index, kind, dim)])
        return model, build.map(model, group)

    return make


def gamma(model, channels, data, **options) -> Tensor:
    options.setdefault("scale", "raw")
    values = attrim.score(model, channels, "arpruning", data, missing="error", **options).values
    return next(iter(values.values()))


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 16, 7, 5), (2, 96, 4, 4), (3, 2, 2, 1), (3, 64, 1, 2)])
def test_the_closed_form_is_the_naive_loop(p, shape) -> None:
    maps = noise(*shape)
    maps[0, 0] = 0
    maps[:, 1] *= 0.1
    fast = left_out(maps.abs().pow(p).flatten(2)).mean(0) / (shape[2] * shape[3])
    torch.testing.assert_close(fast, naive(maps, p), rtol=1e-8, atol=0)


def test_a_channel_that_is_all_there_is_counts_fully_and_an_empty_map_not_at_all() -> None:
    alone = torch.zeros(2, 3, 4, dtype=torch.float64)
    alone[0, 1] = torch.tensor([1.0, 2, 0, 0])
    assert left_out(alone).tolist() == [[0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_criterion_streams_it(p, shown) -> None:
    maps = noise(9, 12, 5, 5).float()
    model, channels = shown(12)
    expected = naive(maps, p).float()
    torch.testing.assert_close(gamma(model, channels, [maps], p=p), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gamma(model, channels, maps.split([4, 4, 1]), p=p), expected, rtol=1e-6, atol=0)
    big = gamma(model, channels, [maps], p=p, scale="relative")
    torch.testing.assert_close(big, expected * 25 * 144, rtol=1e-6, atol=0)


def test_dead_is_zero_constant_is_little_and_scale_does_not_matter(shown) -> None:
    maps = noise(6, 10, 6, 6).relu().float()
    maps[:, 3] = 0
    maps[:, 7] = 0.5
    model, channels = shown(10)
    value = gamma(model, channels, [maps])
    assert value[3] == 0
    assert value[7] < value[[0, 1, 2, 4, 5, 6, 8, 9]].min()
    torch.testing.assert_close(gamma(model, channels, [maps * 1024]), value, rtol=0, atol=0)
    torch.testing.assert_close(gamma(model, channels, [maps * 0.3]), value, rtol=1e-5, atol=0)
    each = maps * torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    torch.testing.assert_close(gamma(model, channels, [each]), value, rtol=1e-5, atol=0)


def test_permuting_channels_permutes_scores(shown) -> None:
    maps = noise(5, 8, 4, 4).float()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    model, channels = shown(8)
    torch.testing.assert_close(
        gamma(model, channels, [maps[:, order]]), gamma(model, channels, [maps])[order], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("width", "side"), [(16, 16), (64, 8), (256, 4), (512, 4)])
def test_the_relative_scale_of_noise_is_four_to_five_at_any_width(width, side, shown) -> None:
    model, channels = shown(width)
    mean = float(gamma(model, channels, [noise(8, width, side, side).relu().float()], scale="relative").mean())
    assert 3.5 <= mean <= 5.5


def test_maps_in_any_layout(shown) -> None:
    maps = noise(4, 6, 3, 5).float()
    expected = naive(maps).float()
    last = shown(6, dim=3)
    torch.testing.assert_close(gamma(*last, [maps.movedim(1, 3)]), expected, rtol=1e-6, atol=0)
    tokens = shown(6, dim=-1)
    torch.testing.assert_close(gamma(*tokens, [maps.flatten(2).movedim(1, 2)]), expected, rtol=1e-6, atol=0)


def test_positions_of_one_channel_leave_together(shown) -> None:
    maps = noise(4, 6, 3, 3).float()
    energy = maps.double().square()
    together = torch.stack([energy[:, 0] + energy[:, 3], energy[:, 1] + energy[:, 4], energy[:, 2] + energy[:, 5]], 1)
    model, channels = shown(6, index=[[0, 3], [1, 4], [2, 5]])
    expected = naive(together, p=1).float()
    torch.testing.assert_close(gamma(model, channels, [maps]), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gamma(model, channels, [maps], scale="relative"), expected * 81, rtol=1e-6, atol=0)


def test_the_tap_is_the_norm_unless_asked_otherwise(small, small_map) -> None:
    small.eval()
    x = noise(7, 2, 6, 6).float()
    with torch.no_grad():
        conv = small.conv1(x)
        norm = small.norm(conv)
    for tap, maps in (("norm", norm), ("act", norm.relu()), ("conv", conv)):
        found = gamma(small, small_map(small), [x], tap=tap)
        torch.testing.assert_close(found, naive(maps).float(), rtol=1e-5, atol=0)
    plain = gamma(small, small_map(small), [x])
    torch.testing.assert_close(plain, naive(norm).float(), rtol=1e-5, atol=0)
    both = gamma(small, small_map(small), [x], combine="bn_scale")
    torch.testing.assert_close(both, plain * torch.tensor([0.5, 2.0, 1.0]), rtol=1e-6, atol=0)


def test_tied_members_are_averaged_on_the_relative_scale(small, build) -> None:
    small.eval()
    x = noise(3, 2, 6, 6).float()
    taps = [build.tap("conv1", 3, "norm"), build.tap("norm", 3, "norm")]
    channels = build.map(small, build.group("g", [build.member("conv1.weight:0", 3, "out")], taps))
    with torch.no_grad():
        conv = small.conv1(x)
        g = [naive(maps) * 36 * 9 for maps in (conv, small.norm(conv))]
    found = gamma(small, channels, [x], scale="relative")
    torch.testing.assert_close(found, ((g[0] + g[1]) / 2).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1, 1)])
def test_maps_of_one_pixel_fall_back_with_a_notice(shape, shown) -> None:
    model, channels = shown(5)
    x = noise(*shape).float()
    with pytest.warns(AttrimWarning, match=r"the maps of 1 groups \(g\) have one pixel.*ranked by 'energy'"):
        value = gamma(model, channels, [x])
    expected = x.abs().flatten(1).mean(0)
    torch.testing.assert_close(value, expected / expected.mean(), rtol=1e-5, atol=0)
    with torch.no_grad():
        model.w.copy_(torch.tensor([1.0, -2, 3, -4, 5]))
    with pytest.warns(AttrimWarning, match="ranked by 'l1'"):
        assert gamma(model, channels, [x], fallback="l1").tolist() == pytest.approx([v / 3 for v in (1, 2, 3, 4, 5)])
    with pytest.raises(CriterionError, match=r"cannot score 1 of 1 groups \(g\)"):
        gamma(model, channels, [x], fallback="error")


def test_a_traced_residual_network_is_scored_whole() -> None:
    model = filled(Residual((8, 16), 2)).eval()
    channels = attrim.trace(model, image(1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score(model, channels, "arpruning", [noise(6, 3, 16, 16).float()])
    assert set(scores.values) == set(channels.groups)
    means = np.array([float(v.mean()) for v in scores.values.values()])
    assert (means > 0.1).all()
    assert means.max() / means.min() < 100


def test_nan_activations_are_located(small, small_map) -> None:
    x = torch.full((1, 2, 4, 4), float("nan"))
    with pytest.raises(CriterionError, match="the activations of 'norm' are NaN or infinite"):
        gamma(small, small_map(small), [x])


def test_wrong_options(small, small_map) -> None:
    x = [noise(1, 2, 4, 4).float()]
    for option, message in (
        ({"tap": "bn"}, "tap: expected one of norm, act, conv, found 'bn'"),
        ({"p": 3}, "p: expected one of 1, 2, 4, found 3"),
        ({"scale": "log"}, "scale: expected one of relative, raw, found 'log'"),
        ({"combine": "x"}, "combine: expected one of none, bn_scale, found 'x'"),
        ({"fallback": "zero"}, "fallback: expected one of energy, l1, l2, error, found 'zero'"),
    ):
        with pytest.raises(CriterionError, match=message):
            gamma(small, small_map(small), x, **option)


def test_640_images_are_enough_by_default(shown) -> None:
    taken = []

    def source():
        for i in range(20):
            taken.append(i)
            yield noise(128, 4, 2, 2).float()

    gamma(*shown(4), source())
    assert len(taken) == 5
