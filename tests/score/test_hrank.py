from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attrim.errors import CriterionError
from attrim.score import score


def hrank(model, channels, data, **options) -> list[float]:
    options.setdefault("normalize", "none")
    return next(iter(score(model, channels, "hrank", data, **options).values.values())).tolist()


def images(count: int = 7, size: int = 5) -> torch.Tensor:
    return torch.randn(count, 2, size, size, generator=torch.Generator().manual_seed(2))


def numpy_ranks(maps: torch.Tensor) -> list[float]:
    return np.linalg.matrix_rank(maps.detach().numpy()).mean(0).tolist()


def test_it_is_the_mean_rank_that_numpy_finds(small, small_map) -> None:
    small.eval()
    with torch.no_grad():
        small.norm.bias[1:] -= 1
    x = images()
    post = small.relu(small.norm(small.conv1(x)))
    expected = numpy_ranks(post)
    assert len(set(expected)) > 1
    assert hrank(small, small_map(small), [x]) == pytest.approx(expected)


def test_the_kind_of_tap_can_be_chosen(small, small_map) -> None:
    small.eval()
    x = images()
    with torch.no_grad():
        small.norm.weight[0] = 0
    assert hrank(small, small_map(small), [x], tap="norm")[0] == 1
    assert hrank(small, small_map(small), [x], tap="conv") == pytest.approx(numpy_ranks(small.conv1(x)))
    assert hrank(small, small_map(small), [x], tap="linear") == hrank(small, small_map(small), [x], tap="act")


def test_known_ranks(build) -> None:
    """Three fixed maps of rank 0, 1 and 3 go through an identity."""
    maps = torch.stack([torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3)])[None]
    model = nn.Sequential(nn.Identity())
    group = build.group("g", [build.member("w:0", 3, "out")], [build.tap("0", 3, "other")])
    model.w = nn.Parameter(torch.zeros(3))
    channels = build.map(model, group)
    assert hrank(model, channels, [maps]) == [0, 1, 3]
    assert hrank(model, channels, [maps, 2 * maps, maps]) == [0, 1, 3]
    last = build.group("g", [build.member("w:0", 3, "out")], [build.tap("0", 3, "other", dim=3)])
    assert hrank(model, build.map(model, last), [maps.movedim(1, 3)]) == [0, 1, 3]
    deep = maps.unsqueeze(2)
    assert hrank(model, channels, [deep]) == [0, 1, 3]


def test_streaming_equals_one_big_batch(small, small_map) -> None:
    x = images(9)
    channels = small_map(small)
    assert hrank(small, channels, x.split([4, 4, 1])) == pytest.approx(hrank(small, channels, [x]))


def test_the_taps_of_a_tied_group_are_averaged(small, build) -> None:
    small.eval()
    taps = [build.tap("conv1", 3, "conv"), build.tap("norm", 3, "conv")]
    channels = build.map(small, build.group("g", [build.member("conv1.weight:0", 3, "out")], taps))
    x = images()
    with torch.no_grad():
        small.norm.weight.zero_()
    at_conv, at_norm = (numpy_ranks(m) for m in (small.conv1(x), small.norm(small.conv1(x))))
    assert hrank(small, channels, [x]) == pytest.approx([(a + b) / 2 for a, b in zip(at_conv, at_norm, strict=True)])
    assert hrank(small, channels, [x], reduction="min") == [1, 1, 1]


def test_several_positions_per_channel_are_added(build) -> None:
    maps = torch.stack([torch.zeros(3, 3), torch.ones(3, 3), torch.eye(3), torch.eye(3)])[None]
    model = nn.Sequential(nn.Identity())
    model.w = nn.Parameter(torch.zeros(4))
    tap = build.tap("0", [[0, 2], [1, 3]], "other")
    channels = build.map(model, build.group("g", [build.member("w:0", [[0, 2], [1, 3]], "out")], [tap]))
    assert hrank(model, channels, [maps]) == [3, 4]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1), (4, 3, 6)])
def test_without_maps_the_mean_absolute_activation_stands_in(shape, build) -> None:
    model = nn.Sequential(nn.Identity())
    model.w = nn.Parameter(torch.zeros(3))
    channels = build.map(model, build.group("g", [build.member("w:0", 3, "out")], [build.tap("0", 3, "other")]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    expected = x.abs().flatten(2).mean((0, 2)) if x.ndim > 2 else x.abs().mean(0)
    assert hrank(model, channels, [x[:3], x[3:]]) == pytest.approx(expected.tolist())
    with pytest.raises(CriterionError, match=r"cannot score 1 of 1 groups \(g\): .*shows its channels as maps"):
        hrank(model, channels, [x], fallback="error")


def test_tokens(build) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    tap = build.tap("0", 3, "linear", dim=2)
    channels = build.map(model, build.group("g", [build.member("0.weight:0", 3, "out")], [tap]))
    x = torch.randn(4, 7, 2)
    assert hrank(model, channels, [x]) == pytest.approx(model(x).abs().mean((0, 1)).tolist())


def test_a_module_that_shows_two_groups_is_not_used(build) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    torch.manual_seed(1)
    model = Shared()
    x = images()
    out = [build.member("a.weight:0", 3, "out")]
    inner = build.group("a", out, [build.tap("a", 3, "conv"), build.tap("relu", 3, "act")])
    expected = numpy_ranks(model.a(x))
    assert hrank(model, build.map(model, inner), [x]) == pytest.approx(expected)
    outer = build.group("b", [build.member("b.weight:0", 3, "out")], [build.tap("relu", 3, "act")])
    scores = score(model, build.map(model, inner, outer), "hrank", [x], missing="skip", normalize="none")
    assert scores.values["a"].tolist() == pytest.approx(expected)
    assert list(scores.values) == ["a"]


def test_groups_without_a_tap_are_named(small, build) -> None:
    channels = build.map(small, build.group("g", [build.member("conv1.weight:0", 3, "out")]))
    with pytest.raises(
        CriterionError, match=r"'hrank' cannot score 1 of 1 groups \(g\): a group needs a module of its own"
    ):
        hrank(small, channels, [images()])


def test_a_tap_that_does_not_exist(small, build) -> None:
    channels = build.map(
        small, build.group("g", [build.member("conv1.weight:0", 3, "out")], [build.tap("conv7", 3, "conv")])
    )
    with pytest.raises(CriterionError, match="another model: there is no module 'conv7'"):
        hrank(small, channels, [images()])


def test_nan_activations_are_located(small, small_map) -> None:
    x = images()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(CriterionError, match="the activations of 'relu' are NaN or infinite"):
        hrank(small, small_map(small), [x])


def test_wrong_options(small, small_map) -> None:
    with pytest.raises(CriterionError, match="tap: expected one of act, norm, conv, linear, other, found 'bn'"):
        hrank(small, small_map(small), [images()], tap="bn")
    with pytest.raises(CriterionError, match="fallback: expected energy or error, found 'zero'"):
        hrank(small, small_map(small), [images()], fallback="zero")


def test_five_hundred_images_are_enough_by_default(small, small_map) -> None:
    taken = []

    def source():
        for i in range(20):
            taken.append(i)
            yield images(100, 3)

    hrank(small, small_map(small), source())
    assert len(taken) == 5
