from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from attrim.core.channels import ChannelMap
from attrim.errors import CriterionError
from attrim.score import score


class Chain(nn.Module):
    """Two linear layers with weights that can be computed by hand; the hidden width is 3."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.b = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, -1.0], [-6.0, 8.0]]))
            self.a.bias.copy_(torch.tensor([0.5, 1.0, -2.0]))
            self.b.weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.0, 2.0]]))


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def hidden(chain: Chain, build) -> ChannelMap:
    members = [build.member("a.weight:0", 3, "out"), build.member("a.bias:0", 3, "shift")]
    return build.map(chain, build.group("a", [*members, build.member("b.weight:1", 3, "in")]))


def values(model: nn.Module, channels: ChannelMap, criterion: str, **options) -> list[float]:
    options.setdefault("normalize", "none")
    scores = score(model, channels, criterion, **options)
    return next(iter(scores.values.values())).tolist()


def test_l1_is_the_sum_of_absolute_weights(chain, hidden) -> None:
    assert values(chain, hidden, "l1") == [7, 1, 14]


def test_l2_is_the_norm_of_the_filter(chain, hidden) -> None:
    assert values(chain, hidden, "l2") == [5, 1, 10]
    assert values(chain, hidden, "l2", squared=True) == [25, 1, 100]


def test_the_default_divides_by_the_mean_of_the_group(chain, hidden) -> None:
    assert values(chain, hidden, "l2", normalize=None) == pytest.approx([15 / 16, 3 / 16, 30 / 16])


def test_roles_choose_the_members(chain, hidden) -> None:
    assert values(chain, hidden, "l1", roles=("in",)) == [2, 2, 2]
    assert values(chain, hidden, "l1", roles=("shift",)) == [0.5, 1, 2]
    both = values(chain, hidden, "l2", roles=("out", "in"))
    assert both == pytest.approx([(5 + math.sqrt(2)) / 2, (1 + 2) / 2, (10 + 2) / 2])


def test_the_group_norm_of_all_members(chain, hidden) -> None:
    norm = values(chain, hidden, "l2", roles=("out", "in"), squared=True, reduction="sum")
    assert norm == pytest.approx([25 + 2, 1 + 4, 100 + 4])


def test_lamp_divides_by_everything_at_least_as_strong(chain, hidden) -> None:
    assert values(chain, hidden, "lamp", normalize=None) == pytest.approx([25 / 125, 1 / 126, 1.0])


def test_fpgm_sums_distances_to_the_other_filters(chain, hidden) -> None:
    d01, d02, d12 = math.hypot(3, 5), math.hypot(9, 4), math.hypot(6, 9)
    assert values(chain, hidden, "fpgm") == pytest.approx([d01 + d02, d01 + d12, d02 + d12])


def test_fpgm_of_equal_filters_is_zero(chain, hidden) -> None:
    with torch.no_grad():
        chain.a.weight.copy_(torch.tensor([[0.1, 0.7]]).expand(3, 2))
    assert values(chain, hidden, "fpgm") == pytest.approx([0, 0, 0], abs=1e-7)


def test_bn_scale_is_the_absolute_gamma(small, small_map) -> None:
    assert values(small, small_map(small), "bn_scale", normalize=None) == [0.5, 2.0, 1.0]


def test_a_channel_owns_several_positions(build) -> None:
    """A flatten after a 2-channel map of 3 pixels: each channel owns three columns of the linear layer."""
    model = nn.Sequential(nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2, 2, 0, 3, 4], [0, 0, 0, 1, 0, 0]]))
    member = build.member("0.weight:1", [[0, 1, 2], [3, 4, 5]], "in")
    channels = build.map(model, build.group("g", [member]))
    assert values(model, channels, "l1", roles=("in",)) == [5, 8]
    assert values(model, channels, "l2", roles=("in",)) == pytest.approx([3, math.sqrt(26)])
    rows = model[0].weight.detach().T.reshape(2, 6)
    assert values(model, channels, "fpgm", roles=("in",)) == pytest.approx([float((rows[0] - rows[1]).norm())] * 2)


def test_channels_in_any_order_and_part_of_an_axis(chain, build) -> None:
    channels = build.map(chain, build.group("g", [build.member("a.weight:0", [2, 0], "out")]))
    assert values(chain, channels, "l2") == [10, 5]


def test_tied_producers_are_averaged_or_as_asked(chain, build) -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 2), "b": nn.Linear(1, 2)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.tensor([[1.0], [5.0]]))
        model["b"].weight.copy_(torch.tensor([[3.0], [-7.0]]))
    tied = [build.member("a.weight:0", 2, "out"), build.member("b.weight:0", 2, "out")]
    channels = build.map(model, build.group("stream", tied))
    assert values(model, channels, "l1") == [2, 6]
    assert values(model, channels, "l1", reduction="sum") == [4, 12]
    assert values(model, channels, "l1", reduction="max") == [3, 7]
    assert values(model, channels, "l1", reduction="first") == [1, 5]
    assert values(model, channels, "lamp") == pytest.approx([1 + 9, 25 + 49])


def test_a_group_without_producers_is_valued_by_what_it_has(chain, build) -> None:
    channels = build.map(chain, build.group("g", [build.member("b.weight:1", 3, "in")]))
    assert values(chain, channels, "l1") == [2, 2, 2]
    assert values(chain, channels, "lamp") == pytest.approx([2, 4, 4])


def test_half_precision_weights(chain, hidden) -> None:
    assert values(chain.to(torch.bfloat16), hidden, "l2") == [5, 1, 10]
    assert values(chain, hidden, "fpgm") == pytest.approx([5.8309 + 9.8489, 5.8309 + 10.8167, 20.6656], rel=1e-4)


def test_random_depends_on_its_seed_only(chain, hidden) -> None:
    torch.manual_seed(5)
    first = values(chain, hidden, "random")
    state = torch.random.get_rng_state()
    assert values(chain, hidden, "random", seed=0) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert values(chain, hidden, "random", seed=1) != first
    assert all(0 <= v < 1 for v in first)
    with pytest.raises(CriterionError, match=r"seed: expected an int, found 1\.5"):
        values(chain, hidden, "random", seed=1.5)


def test_bn_scale_without_a_norm_names_the_groups(chain, hidden) -> None:
    message = (
        r"'bn_scale' cannot score 1 of 1 groups \(a\): a group needs a norm with a learnable scale.*Use criterion 'l2'"
    )
    with pytest.raises(CriterionError, match=message):
        score(chain, hidden, "bn_scale")


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "fpgm"])
def test_nan_weights_are_named(chain, hidden, criterion) -> None:
    with torch.no_grad():
        chain.a.weight[1, 1] = math.nan
    with pytest.raises(CriterionError, match=r"'a\.weight' holds NaN or infinite values.*Repair the weights"):
        score(chain, hidden, criterion)


@pytest.mark.parametrize("roles", ["out", (), ("output",)])
def test_wrong_roles_list_the_known_ones(chain, hidden, roles) -> None:
    with pytest.raises(CriterionError, match="roles: expected a tuple with some of out, in, scale, shift, param"):
        score(chain, hidden, "l2", roles=roles)
