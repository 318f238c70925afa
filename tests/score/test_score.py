from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attrim.core.scores import Scores
from attrim.errors import CriterionError, DataError, InputError
from attrim.score import CRITERIA, Criterion, score

NAMES = ["random", "l1", "l2", "lamp", "fpgm", "bn_scale", "taylor", "hrank", "obs", "refit", "arpruning"]


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, 6, 6, generator=generator), torch.randint(0, 4, (4,), generator=generator)) for _ in range(3)
    ]


def test_the_table_of_names() -> None:
    assert list(CRITERIA) == NAMES
    assert [c.name for c in CRITERIA.values() if c.needs_data] == ["taylor", "hrank", "obs", "refit", "arpruning"]
    assert [c.name for c in CRITERIA.values() if c.needs_labels] == ["taylor"]
    assert all(c.summary and (c.source or c.name == "random") for c in CRITERIA.values())
    with pytest.raises(TypeError):
        CRITERIA["mine"] = CRITERIA["l2"]  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_each_criterion_scores_and_leaves_no_trace(name, small, small_map, data) -> None:
    small.train()
    small.norm.eval()
    small.conv1.weight.requires_grad_(False)
    small.conv2.weight.grad = torch.ones_like(small.conv2.weight)
    before = copy.deepcopy(small.state_dict())
    flags = {n: m.training for n, m in small.named_modules()}
    scores = score(small, small_map(small), name, data)
    assert scores.criterion == name
    assert scores.values["conv1"].shape == (3,)
    assert scores.values["conv1"].dtype == torch.float32
    assert len(set(scores.values["conv1"].tolist())) > 1 or name == "hrank"
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())
    assert {n: m.training for n, m in small.named_modules()} == flags
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [n for n, p in small.named_parameters() if p.grad is not None] == ["conv2.weight"]
    assert small.conv2.weight.grad.eq(1).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_scores(name, small, small_map, data) -> None:
    first = score(small, small_map(small), name, data)
    torch.manual_seed(99)
    assert torch.equal(score(small, small_map(small), name, data).values["conv1"], first.values["conv1"])


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit"])
def test_a_dead_channel_scores_lowest(name, small, small_map, data) -> None:
    with torch.no_grad():
        small.norm.weight[1] = 0
        small.norm.bias[1] = -1
    value = score(small, small_map(small), name, data).values["conv1"]
    assert value.argmin() == 1
    assert value[1] == 0
    assert value[[0, 2]].min() > 0


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit", "arpruning"])
def test_everything_is_put_back_after_an_error(name, small, small_map, data) -> None:
    small.train()
    fused = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(DataError, match=r"the model failed on a batch with inputs of shape \[\(1, 7, 6, 6\)\]"):
        score(small, small_map(small), name, [*data, (torch.zeros(1, 7, 6, 6), torch.zeros(1).long())])
    assert small.training
    assert small.norm.training
    assert all(p.requires_grad for p in small.parameters())
    assert not any(m._forward_hooks for m in small.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fused


class Counting(nn.Module):
    """A model that changes a buffer on every call, in eval mode too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x.flatten()[:2].clone()
        return self.inner(x)


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit", "arpruning"])
def test_buffers_that_the_model_moves_itself_are_put_back(name, build, data) -> None:
    model = Counting(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    members = [build.member("inner.0.weight:0", 3, "out"), build.member("inner.1.weight:1", 3, "in")]
    channels = build.map(model, build.group("g", members, [build.tap("inner.0", 3, "conv")]))
    last = model.last
    score(model, channels, name, data)
    assert model.calls == 0
    assert model.last is last


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit", "arpruning"])
def test_it_works_where_gradients_are_off(name, small, small_map, data) -> None:
    expected = score(small, small_map(small), name, data).values["conv1"]
    with torch.no_grad():
        assert torch.equal(score(small, small_map(small), name, data).values["conv1"], expected)


def test_unknown_names_get_close_matches(small, small_map) -> None:
    with pytest.raises(
        CriterionError, match=r"unknown criterion 'tailor'\. Did you mean taylor\? The criteria are: random"
    ):
        score(small, small_map(small), "tailor")


def test_unknown_options_list_the_known_ones(small, small_map) -> None:
    with pytest.raises(CriterionError, match=r"'l2' has no option 'role'\. Its options are: roles, squared"):
        score(small, small_map(small), "l2", role=("in",))


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit", "arpruning"])
def test_missing_data(name, small, small_map) -> None:
    with pytest.raises(CriterionError, match=rf"'{name}' needs data: an iterable of batches.*'{name}', loader"):
        score(small, small_map(small), name)


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit", "arpruning"])
@pytest.mark.parametrize("empty", [[], iter([]), [(torch.zeros(0, 2, 6, 6), torch.zeros(0).long())]])
def test_empty_data(name, empty, small, small_map) -> None:
    with pytest.raises(CriterionError, match=rf"'{name}' needs data and `batches` yielded no sample"):
        score(small, small_map(small), name, empty)


def test_one_batch_in_place_of_many(small, small_map, data) -> None:
    for batch in (data[0], data[0][0], {"x": data[0][0]}):
        with pytest.raises(DataError, match=r"expected an iterable of batches, found one .*Put it in a list"):
            score(small, small_map(small), "obs", batch)
    with pytest.raises(DataError, match=r"expected an iterable of batches .* found int"):
        score(small, small_map(small), "obs", 3)


@pytest.mark.parametrize("name", ["taylor", "hrank", "obs", "refit", "arpruning"])
def test_nan_weights(name, small, small_map, data) -> None:
    with torch.no_grad():
        small.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CriterionError, match=r"'conv2\.weight': NaN or infinite weights"):
        score(small, small_map(small), name, data)


def test_samples_stops_early_and_is_checked(small, small_map, data) -> None:
    first = score(small, small_map(small), "obs", data[:1])
    limited = score(small, small_map(small), "obs", iter(data), samples=3)
    assert torch.equal(first.values["conv1"], limited.values["conv1"])
    with pytest.raises(CriterionError, match="samples: expected a positive int or None, found 0"):
        score(small, small_map(small), "obs", data, samples=0)


def test_a_map_of_another_model(small, small_map) -> None:
    channels = small_map(small)
    small.conv1 = nn.Conv2d(2, 5, 3, bias=False)
    with pytest.raises(
        CriterionError, match=r"another model: it says 'conv1.weight' has shape \(3, 2, 3, 3\).*\(5, 2, 3, 3\)"
    ):
        score(small, channels, "l2")
    with pytest.raises(InputError, match=r"score expects \(model, channels, criterion\).*found SmallNet and str"):
        score(small, "l2", channels)  # type: ignore[arg-type]


def test_no_group_gives_no_scores(small, build, data) -> None:
    for name in NAMES:
        assert score(small, build.map(small), name, data).values == {}


def test_skip_leaves_groups_out(small, build) -> None:
    with_norm = build.group("a", [build.member("conv1.weight:0", 3, "out"), build.member("norm.weight:0", 3, "scale")])
    without = build.group("b", [build.member("conv2.weight:0", 4, "out")])
    channels = build.map(small, with_norm, without)
    with pytest.raises(
        CriterionError, match=r"cannot score 1 of 2 groups \(b\).*missing='skip' to leave these groups whole"
    ):
        score(small, channels, "bn_scale")
    assert list(score(small, channels, "bn_scale", missing="skip").values) == ["a"]
    with pytest.raises(CriterionError, match="missing: expected error or skip, found 'ignore'"):
        score(small, channels, "bn_scale", missing="ignore")
    with pytest.raises(CriterionError, match="cannot score 1 of 1 groups"):
        score(small, build.map(small, without), "bn_scale", missing="skip")


def test_callables(small, small_map) -> None:
    channels = small_map(small)
    mine = {"conv1": [1, 5, 3]}
    assert score(small, channels, lambda m, c, b: mine).values["conv1"].tolist() == [1, 5, 3]
    assert score(small, channels, lambda m, c, b: Scores(mine, "mine")).criterion == "mine"
    assert score(small, channels, lambda m, c, b, by: {"conv1": [by] * 3}, by=2).values["conv1"].tolist() == [2, 2, 2]
    assert score(small, channels, lambda m, c, b: mine, normalize="sum").values["conv1"].sum() == 1
    assert score(small, channels, lambda m, c, b: {"conv1": [b, b, b]}, 7).values["conv1"].tolist() == [7, 7, 7]
    assert score(small, channels, lambda m, c, b: {}).values == {}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType; expected Scores, or a mapping"),
        ({"conv9": [1, 2, 3]}, "scored 'conv9', which is no group of this map. The groups are: conv1"),
        ({"conv1": [1, 2]}, "gave 2 scores for group 'conv1', which has 3 channels"),
        ({"conv1": [1, float("nan"), 2]}, "1 of 3 scores of group 'conv1' are NaN"),
        ({"conv1": [[1, 2, 3]]}, "expected one score per channel of group 'conv1'"),
    ],
)
def test_what_a_callable_returns_is_checked(result, message, small, small_map) -> None:
    def mine(model, channels, batches):
        return result

    with pytest.raises(CriterionError, match=f"criterion 'mine'.*{message}"):
        score(small, small_map(small), mine)


def test_reduction_has_no_meaning_for_a_callable(small, small_map) -> None:
    with pytest.raises(CriterionError, match="nothing to reduce"):
        score(small, small_map(small), lambda m, c, b: {"conv1": [1, 2, 3]}, reduction="max")
    with pytest.raises(CriterionError, match=r"expected a name \(random.*or a callable.*found int"):
        score(small, small_map(small), 5)  # type: ignore[arg-type]


def test_a_table_and_a_criterion_can_be_passed_in(small, small_map) -> None:
    def by_index(model, channels, batches, *, reduction):
        return {group.id: torch.arange(group.size, dtype=torch.float64) for group in channels}

    mine = Criterion("mine", by_index, False, False, "by index", "", normalize="max")
    assert score(small, small_map(small), mine).values["conv1"].tolist() == [0, 0.5, 1]
    table = {**CRITERIA, "mine": mine}
    assert score(small, small_map(small), "mine", criteria=table, normalize="none").values["conv1"].tolist() == [
        0,
        1,
        2,
    ]
    assert "mine" not in CRITERIA
