from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, linear, unfold

from attrim.errors import AttrimWarning, CriterionError
from attrim.score import gram, score

EXACT = {"damping": 0.0, "normalize": "none"}


def obs(model, channels, data, **options) -> torch.Tensor:
    return next(iter(score(model, channels, "obs", data, **options).values.values())).double()


def correlated(samples: int, width: int, seed: int = 0, shift: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mixing + shift


def refit_error(columns: torch.Tensor, weight: torch.Tensor, drop: list[int], intercept: bool = False) -> float:
    """Half the mean squared error per row of ``columns`` when ``drop`` goes and the other weights are refitted."""
    target = columns @ weight.T
    kept = columns[:, [c for c in range(columns.shape[1]) if c not in drop]]
    if intercept:
        kept = torch.cat([kept, torch.ones(len(kept), 1, dtype=kept.dtype)], 1)
    solution = torch.linalg.lstsq(kept, target, driver="gelsd").solution
    return float(0.5 * (target - kept @ solution).square().sum(1).mean())


@pytest.fixture
def head(build):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 5)).double()
    return model, build.map(model, build.group("g", [build.member("1.weight:1", 4, "in")]))


def test_linear_equals_least_squares(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    expected = [refit_error(x, model[1].weight.detach(), [c]) for c in range(4)]
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)


def test_centred_equals_least_squares_with_a_new_bias(head) -> None:
    model, channels = head
    x = correlated(40, 4, shift=3)
    expected = [refit_error(x, model[1].weight.detach(), [c], intercept=True) for c in range(4)]
    assert obs(model, channels, [x], centred=True, **EXACT).tolist() == pytest.approx(expected, rel=1e-5)


def test_damping_tends_to_least_squares(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    exact = obs(model, channels, [x], **EXACT)
    errors = [
        float((obs(model, channels, [x], damping=d, normalize="none") - exact).abs().max()) for d in (1e-1, 1e-3, 1e-5)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3 * float(exact.max())


def test_diagonal(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    expected = 0.5 * model[1].weight.detach().square().sum(0) * x.square().mean(0)
    assert torch.allclose(obs(model, channels, [x], hessian="diagonal", **EXACT), expected, rtol=1e-6)
    variance = 0.5 * model[1].weight.detach().square().sum(0) * x.var(0, correction=0)
    centred = obs(model, channels, [x], hessian="diagonal", centred=True, **EXACT)
    assert torch.allclose(centred, variance, rtol=1e-6)


def test_a_copy_of_another_channel_scores_next_to_nothing(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    x[:, 2] = x[:, 0]
    value = obs(model, channels, [x], damping=1e-6, normalize="mean")
    assert set(value.argsort()[:2].tolist()) == {0, 2}
    assert value[[0, 2]].max() < 1e-3
    assert value[[1, 3]].min() > 0.1
    with pytest.raises(CriterionError, match=r"Gram matrix of the inputs of '1\.weight' is singular.*Give more data"):
        obs(model, channels, [x[:3]], **EXACT)


def test_a_dead_input_scores_exactly_zero(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    x[:, 1] = 0
    for hessian in ("gram", "diagonal"):
        for damping in (0, 1e-3):
            value = obs(model, channels, [x], hessian=hessian, damping=damping)
            assert value[1] == 0
            assert value[[0, 2, 3]].min() > 0
    x[:, 1] = 7
    assert obs(model, channels, [x.float().double()], centred=True)[1] == 0
    assert obs(model, channels, [x])[1] > 0
    assert obs(model, channels, [0 * x], damping=1e-3).tolist() == [0, 0, 0, 0]


def test_very_small_activations_in_single_precision(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    expected = obs(model, channels, [x])
    model.float()
    assert torch.allclose(obs(model, channels, [(x * 1e-25).float()]), expected, rtol=1e-4)
    x[:, 1] = 0
    assert obs(model, channels, [(x * 1e-25).float()])[1] == 0


def test_nan_inputs_are_located(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    x[3, 2] = math.nan
    with pytest.raises(CriterionError, match=r"the inputs of '1\.weight' are NaN or infinite"):
        obs(model, channels, [x])


def test_a_channel_with_several_columns_goes_at_once(build) -> None:
    torch.manual_seed(4)
    model = nn.Linear(6, 3).double()
    index = [[0, 3], [1, 4], [2, 5]]
    channels = build.map(model, build.group("g", [build.member("weight:1", index, "in")]))
    x = correlated(50, 6)
    expected = [refit_error(x, model.weight.detach(), drop) for drop in index]
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)
    diagonal = 0.5 * (model.weight.detach().square().sum(0) * x.square().mean(0)).reshape(2, 3).sum(0)
    assert torch.allclose(obs(model, channels, [x], hessian="diagonal", **EXACT), diagonal, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": (2, 3), "padding": (0, 2), "dilation": (2, 1), "stride": (1, 2)},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 2, "padding": "same"},
    ],
)
def test_convolution_by_patch_equals_least_squares(window, build) -> None:
    torch.manual_seed(5)
    model = nn.Conv2d(3, 4, bias=False, **window).double()
    channels = build.map(model, build.group("g", [build.member("weight:1", 3, "in")]))
    x = correlated(6 * 49, 3).reshape(6, 7, 7, 3).permute(0, 3, 1, 2) + torch.randn(6, 3, 7, 7, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1)) if window.get("padding") == "same" else x
    padding = 0 if window.get("padding") == "same" else window.get("padding", 0)
    taps = math.prod(model.kernel_size)
    columns = unfold(padded, model.kernel_size, window.get("dilation", 1), padding, model.stride)
    assert columns.shape[2] == model(x)[0, 0].numel()
    rows = columns.transpose(1, 2).reshape(-1, 3 * taps)
    weight = model.weight.detach().flatten(1)
    drops = [list(range(c * taps, (c + 1) * taps)) for c in range(3)]
    expected = [refit_error(rows, weight, drop) * columns.shape[2] for drop in drops]
    assert obs(model, channels, [x], form="patch", **EXACT).tolist() == pytest.approx(expected, rel=1e-5)
    energy = (weight.square().sum(0) * rows.square().mean(0)).reshape(3, taps).sum(1) * columns.shape[2] / 2
    assert torch.allclose(obs(model, channels, [x], form="patch", hessian="diagonal", **EXACT), energy, rtol=1e-6)


def test_a_kernel_of_one_pixel_is_the_same_in_both_forms(build) -> None:
    torch.manual_seed(5)
    model = nn.Conv2d(3, 4, 1).double()
    channels = build.map(model, build.group("g", [build.member("weight:1", 3, "in")]))
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    both = [obs(model, channels, [x], form=form, **EXACT) for form in ("patch", "channel")]
    assert torch.equal(*both)
    as_linear = refit_error(x.movedim(1, 3).reshape(-1, 3), model.weight.detach().flatten(1), [0])
    assert both[0][0].item() == pytest.approx(as_linear * 16, rel=1e-5)


def test_the_channel_form_shares_the_pixels_between_taps(build) -> None:
    torch.manual_seed(5)
    model = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    channels = build.map(model, build.group("g", [build.member("weight:1", 3, "in")]))
    x = correlated(8 * 36, 3).reshape(8, 6, 6, 3).permute(0, 3, 1, 2)
    pixels = x.movedim(1, 3).reshape(-1, 3)
    per_tap = model.weight.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    expected = [refit_error(pixels, per_tap, [c]) * 9 for c in range(3)]
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)
    centred = [refit_error(pixels, per_tap, [c], intercept=True) * 9 for c in range(3)]
    assert obs(model, channels, [x], centred=True, **EXACT).tolist() == pytest.approx(centred, rel=1e-5)


@pytest.mark.parametrize("form", ["channel", "patch"])
def test_grouped_convolution_is_a_sum_over_its_groups(form, build) -> None:
    torch.manual_seed(6)
    grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False).double()
    channels = build.map(grouped, build.group("g", [build.member("weight:1", 3, "in")]))
    x = torch.randn(12, 6, 5, 5, dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)
    for part, weight in zip(x.chunk(2, 1), grouped.weight.chunk(2), strict=True):
        single = nn.Conv2d(3, 2, 3, bias=False).double()
        single.weight = nn.Parameter(weight.detach().clone())
        alone = build.map(single, build.group("g", [build.member("weight:1", 3, "in")]))
        total += obs(single, alone, [part], form=form, **EXACT)
    assert torch.allclose(obs(grouped, channels, [x], form=form, **EXACT), total, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_reads_single_pixels(groups, build) -> None:
    torch.manual_seed(6)
    model = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, bias=False).double()
    channels = build.map(model, build.group("g", [build.member("weight:0", [[0, 2], [1, 3]], "in")]))
    x = torch.randn(9, 4, 3, 3, dtype=torch.float64)
    if groups == 1:
        # Kernel and stride are equal, so every input pixel makes outputs of its own.
        rows = x.movedim(1, 3).reshape(-1, 4)
        weight = model.weight.detach().flatten(1).T
        expected = [refit_error(rows, weight, drop) * 36 for drop in ([0, 2], [1, 3])]
    else:
        expected = []
        for drop in (0, 1):
            error = 0.0
            for part, weight in zip(x.chunk(2, 1), model.weight.detach().chunk(2), strict=True):
                error += refit_error(part.movedim(1, 3).reshape(-1, 2), weight.flatten(1).T, [drop]) * 36
            expected.append(error)
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)


def test_consumers_are_added_or_as_asked(build) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.b(x).sum() + self.c(x.relu()).sum()

    torch.manual_seed(0)
    model = Fork().double()
    members = [build.member("b.weight:1", 3, "in"), build.member("c.weight:1", 3, "in")]
    channels = build.map(model, build.group("g", members))
    x = correlated(30, 3)
    b = torch.tensor([refit_error(x, model.b.weight.detach(), [i]) for i in range(3)])
    c = torch.tensor([refit_error(x.relu(), model.c.weight.detach(), [i]) for i in range(3)])
    assert torch.allclose(obs(model, channels, [x], **EXACT), (b + c).double(), rtol=1e-5)
    assert torch.allclose(obs(model, channels, [x], reduction="max", **EXACT), torch.maximum(b, c).double(), rtol=1e-5)


def test_a_module_called_twice_counts_every_call(build) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + self.a(x * 2)

    torch.manual_seed(0)
    model = Twice().double()
    channels = build.map(model, build.group("g", [build.member("a.weight:1", 3, "in")]))
    x = correlated(30, 3)
    weight = model.a.weight.detach()
    expected = [2 * refit_error(torch.cat([x, 2 * x]), weight, [c]) for c in range(3)]
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)


class Functional(nn.Module):
    """The same linear map written in ways that no module shows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.how = how
        shape = (4, 5) if how in ("matmul", "einsum_in_first") else (5, 4)
        self.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x):
        if self.how == "linear":
            return linear(x, self.w)
        if self.how == "matmul":
            return x @ self.w
        if self.how == "einsum":
            return torch.einsum("nc,dc->nd", x, self.w)
        if self.how == "einsum_in_first":
            return torch.einsum("nc,cd->nd", x, self.w)
        if self.how == "weight_first":
            return (self.w @ x.T).T
        return conv2d(x[:, :, None, None], self.w[:, :, None, None]).flatten(1)


@pytest.mark.parametrize("how", ["linear", "matmul", "einsum", "einsum_in_first", "weight_first"])
def test_functional_calls_are_seen(how, build) -> None:
    model = Functional(how)
    dim = 0 if how in ("matmul", "einsum_in_first") else 1
    channels = build.map(model, build.group("g", [build.member(f"w:{dim}", 4, "in")]))
    x = correlated(30, 4)
    weight = model.w.detach() if dim else model.w.detach().T
    expected = [refit_error(x, weight, [c]) for c in range(4)]
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)


def test_tokens_are_added_up_per_sample(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    assert torch.allclose(
        obs(model, channels, [x.reshape(8, 5, 4)], **EXACT), 5 * obs(model, channels, [x], **EXACT), rtol=1e-6
    )


@pytest.mark.parametrize("cross", [False, True])
def test_packed_attention_projections(cross, build) -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x + 1, x + 1)[0] if cross else self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = Attend().double()
    channels = build.map(model, build.group("g", [build.member("attention.in_proj_weight:1", 4, "in")]))
    x = correlated(60, 4).reshape(12, 5, 4)
    rows = x.reshape(-1, 4)
    q, kv = model.attention.in_proj_weight.detach().split([4, 8])
    other = rows + 1 if cross else rows
    expected = [5 * (refit_error(rows, q, [c]) + refit_error(other, kv, [c])) for c in range(4)]
    assert obs(model, channels, [x], **EXACT).tolist() == pytest.approx(expected, rel=1e-5)


def test_streaming_equals_one_big_batch(small, small_map) -> None:
    small.double()
    x = torch.randn(11, 2, 6, 6, dtype=torch.float64)
    for form in ("channel", "patch"):
        whole = obs(small, small_map(small), [x], form=form)
        assert torch.allclose(obs(small, small_map(small), x.split([4, 4, 3]), form=form), whole, rtol=1e-6)


def test_memory_does_not_grow_with_the_data(small, small_map) -> None:
    alive = []

    def source():
        for _ in range(8):
            x = torch.randn(4, 2, 6, 6)
            yield x
            del x
            gc.collect()
            alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))

    obs(small, small_map(small), source())
    assert len(set(alive[1:])) == 1


def test_chunks_of_an_unfolded_input_change_nothing(small, small_map, monkeypatch) -> None:
    x = torch.randn(9, 2, 6, 6, dtype=torch.float64)
    small.double()
    whole = obs(small, small_map(small), [x], form="patch")
    monkeypatch.setattr(gram, "_CHUNK", 2000)
    assert torch.allclose(obs(small, small_map(small), [x], form="patch"), whole, rtol=1e-6)


def test_half_precision(small, small_map) -> None:
    x = torch.randn(16, 2, 6, 6)
    full = obs(small, small_map(small), [x])
    small.bfloat16()
    assert torch.allclose(obs(small, small_map(small), [x.bfloat16()]), full, rtol=0.1)


def test_consumers_that_are_too_wide_use_the_diagonal_and_say_so(head) -> None:
    model, channels = head
    x = correlated(40, 4)
    with pytest.warns(AttrimWarning, match=r"'1\.weight' reads 4 columns, more than widest=3.*diagonal"):
        value = obs(model, channels, [x], widest=3, normalize="none")
    assert torch.equal(value, obs(model, channels, [x], hessian="diagonal", normalize="none"))


def test_groups_whose_consumers_cannot_be_seen_are_named(build) -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    seen = build.group("fine", [build.member("1.weight:1", 2, "in")])
    computed = build.group("computed", [build.member("0.parametrizations.weight.original1:1", 3, "in")])
    nothing = build.group("nothing", [build.member("1.bias:0", 2, "shift")])
    channels = build.map(model, seen, computed, nothing)
    x = torch.randn(20, 3)
    with pytest.raises(
        CriterionError, match=r"cannot score 2 of 3 groups \(computed, nothing\): a group needs consumers"
    ):
        score(model, channels, "obs", [x])
    assert list(score(model, channels, "obs", [x], missing="skip").values) == ["fine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hessian": "fisher"}, "hessian: expected gram or diagonal, found 'fisher'"),
        ({"form": "pixel"}, "form: expected channel or patch, found 'pixel'"),
        ({"damping": -1}, "damping: expected a number >= 0, found -1"),
        ({"damping": math.nan}, "damping: expected a number >= 0, found nan"),
        ({"reduction": "median"}, "reduction: expected one of mean"),
    ],
)
def test_wrong_options(options, message, head) -> None:
    model, channels = head
    with pytest.raises(CriterionError, match=message):
        obs(model, channels, [correlated(9, 4)], **options)
