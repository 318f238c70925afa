"""Every pattern network: traced, cut at random, verified, and held against an oracle independent of attrim."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.core.plan import Cut
from zoo import REGISTRY, Pattern
from zoo.oracle import forward, leaves, oracle_error

TOLERANCE = 1e-9

NAMES = """
    add_conv_of_cat_and_part attn_fused_no_hint attn_fused_sdpa attn_sep_qkv attn_sep_qkv_no_hint bilinear_matmul
    broadcast_add_1ch buffer_chan cat_same_twice cat_then_flatten cat_then_residual chain chan_mean_attn channel_shuffle
    chunk_csp_c2f chunk_glu chunk_two_convs chunk_two_convs_rev concat2 convT convT_depthwise convT_groups dense_cascade
    depthwise depthwise_mult2 detach_branch einsum_mix embedding fixed_int_attr flatten_conv1d flatten_conv3d flatten_hw
    flatten_then_cat frozen_bn_mid frozen_stem functional_conv gqa_repeat groupconv4 groupconv_res groupconv_uneven
    groupnorm gru inception4 instancenorm_stats layernorm_chw layerscale_flat layerscale_param linear_view_conv lstm
    mha_torch multi_output_dict output_is_feature pad_shortcut_A permute_channels_last pixel_shuffle prelu residual
    resnext_block reuse_conv reuse_head_two_levels se_block shufflev2 slice_channels spatial_gate_1ch spatial_param
    split_attr split_one_unused stack_sum stack_weighted_param tied_embedding tok_cat_dim2 tok_cat_dimm1
    tok_swiglu_chunk tok_swiglu_chunk2 tokens_flatten_transpose transformer_mlp_ln unet_up weight_norm_param
"""
"""The 78 patterns on which another pruning library was measured; the floor for this one."""

ACCEPTANCE = tuple(NAMES.split())

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(REGISTRY), scope="module")
def pattern(request: pytest.FixtureRequest) -> Pattern:
    return REGISTRY[request.param]


def axes(model: nn.Module) -> dict[str, int]:
    """Axis as it prints -> size, parameters and buffers; a tied tensor under its first name."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {f"{name}:{dim}": size for name, tensor in tensors for dim, size in enumerate(tensor.shape)}


def matching(names: Any, glob: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, glob)]


def random_scores(channels: attrim.ChannelMap, seed: int) -> attrim.Scores:
    generator = torch.Generator().manual_seed(seed)
    return attrim.Scores({g.id: torch.rand(g.size, generator=generator) for g in channels}, "random numbers")


def test_the_acceptance_patterns_are_all_here() -> None:
    assert len(ACCEPTANCE) == len(set(ACCEPTANCE)) == 78
    assert set(ACCEPTANCE) <= set(REGISTRY)


def test_at_least_seventy_acceptance_patterns_must_be_cut() -> None:
    assert len(REGISTRY) >= 78
    assert sum(REGISTRY[name].expect == "cut" for name in ACCEPTANCE) >= 70
    assert all(p.expect == "cut" or (p.must_refuse and p.note) for p in REGISTRY.values())


def test_pattern_runs_and_hears_what_is_cut(pattern: Pattern) -> None:
    """Forward is finite, repeats itself, and every tensor that must be cut has a say in the outputs."""
    model, inputs = pattern.build()
    before = leaves(forward(model, inputs))
    assert before
    assert all(t.dtype == torch.float64 and bool(t.isfinite().all()) for t in before)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(forward(pattern.build()[0], inputs)), strict=True))
    names = axes(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for glob in (*pattern.must_cut, *pattern.must_refuse, *pattern.consumers, *pattern.producers):
        assert matching(names, glob), f"no axis matches {glob}"
    for name in {axis.rpartition(":")[0] for glob in pattern.must_cut for axis in matching(names, glob)}:
        tensor = tensors[name].data
        kept = tensor.clone()
        tensor.mul_(1.3).add_(0.1)
        after = leaves(forward(model, inputs))
        tensor.copy_(kept)
        assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-6, name


@pytest.mark.parametrize("seed", SEEDS)
def test_pattern_is_cut_and_right(pattern: Pattern, seed: int) -> None:
    model, inputs = pattern.build()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = _plain_attributes(model)
    before = leaves(forward(model, inputs))

    channels = attrim.trace(model, inputs)
    scope = "group" if seed == 0 else "global"
    budget = attrim.Budget(channels=0.5, min_keep=1, scope=scope)
    plan = attrim.allocate(channels, random_scores(channels, seed), budget)
    small = attrim.apply(model, plan)
    check = attrim.verify(model, small, plan, inputs)

    assert _plain_attributes(model) == attributes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert check.ok, f"{check}\n{channels.table()}"
    assert check.max_error < TOLERANCE or not check.exact, str(check)
    _assert_outputs(before, leaves(forward(small, inputs)))
    _assert_kept_flags(model, small)
    _assert_exactness_is_named(pattern, channels, plan, check.exact)
    if check.exact or pattern.independent_oracle:
        error = oracle_error(model, small, plan, inputs, pattern.consumers, pattern.producers)
        assert error is not None, "the oracle found nothing to mask"
        assert error < TOLERANCE, f"the masked original differs by {error}\n{channels.table()}"
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    if seed == 0:
        _assert_shrunk(pattern, model, small, channels)
    _assert_whole(pattern, model, small, channels)


@pytest.mark.slow
def test_each_group_alone_down_to_one_channel(pattern: Pattern) -> None:
    """Every group by itself loses all channels but one, then a single one: an axis of width 1 is still the right one."""
    model, inputs = pattern.build()
    channels = attrim.trace(model, inputs)
    for group in channels:
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(1)).tolist()
        for count in {1, group.size - 1}:
            plan = attrim.plan_from_kept(channels, {group.id: sorted(order[:count])})
            small = attrim.apply(model, plan)
            check = attrim.verify(model, small, plan, inputs)
            assert check.ok, f"'{group.id}' cut to {count} of {group.size}: {check}"
            if check.exact or pattern.independent_oracle:
                error = oracle_error(model, small, plan, inputs, pattern.consumers, pattern.producers)
                assert error is not None
                assert error < TOLERANCE, f"'{group.id}' cut to {count} of {group.size}: {error}"


def _plain_attributes(model: nn.Module) -> list[tuple[str, str, str]]:
    """Everything a module states about itself as a number, flag or list."""
    return [
        (path, name, repr(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, tuple, list))
    ]


def _assert_outputs(before: list[Tensor], after: list[Tensor]) -> None:
    assert [t.shape for t in after] == [t.shape for t in before]
    assert all(t.dtype == b.dtype and bool(t.isfinite().all()) for t, b in zip(after, before, strict=True))


def _assert_kept_flags(model: nn.Module, small: nn.Module) -> None:
    """Names, ties and ``requires_grad`` survive."""
    old, new = (dict(m.named_parameters()) for m in (model, small))
    assert list(old) == list(new)
    assert {n: p.requires_grad for n, p in old.items()} == {n: p.requires_grad for n, p in new.items()}
    assert [m.training for m in model.modules()] == [m.training for m in small.modules()]


def _assert_exactness_is_named(
    pattern: Pattern, channels: attrim.ChannelMap, plan: attrim.PruningPlan, exact: bool
) -> None:
    """Inexact only for a cause that the pattern allows, and reported as such."""
    cut = {f"{name}:{dim}" for name, c in plan.cuts.items() for dim in c.keep}
    effects = [e for g in channels if any(str(m.axis) in cut for m in g.members) for e in g.effects]
    assert exact == (not effects)
    for effect in effects:
        assert any(cause in effect.lower() for cause in pattern.inexact), f"not an allowed cause: {effect}"


def _assert_shrunk(pattern: Pattern, model: nn.Module, small: nn.Module, channels: attrim.ChannelMap) -> None:
    old, new = axes(model), axes(small)
    for glob in pattern.must_cut:
        shrunk = [name for name in matching(old, glob) if new[name] < old[name]]
        assert shrunk, f"{glob} kept its width\n{channels.table()}"


def _assert_whole(pattern: Pattern, model: nn.Module, small: nn.Module, channels: attrim.ChannelMap) -> None:
    """Refused axes stay, and the map says why, with a line of code."""
    old, new = axes(model), axes(small)
    for glob in pattern.must_refuse:
        for name in matching(old, glob):
            assert new[name] == old[name]
        pins = [pin for pin in channels.pinned if fnmatchcase(str(pin.axis), glob)]
        assert pins, f"{glob} stays and no reason is given\n{channels.table()}"
        for pin in pins:
            assert re.search(r"\.py:\d+|output of the network", str(pin.reason)), str(pin.reason)
            assert str(pin.reason) in channels.explain(str(pin.axis))


class _Two(nn.Module):
    """A chain small enough to be cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 6, 1), nn.GroupNorm(1, 6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


@pytest.mark.parametrize(("columns", "right"), [((0, 2, 5), True), ((0, 2, 4), False)])
def test_oracle_tells_right_from_wrong_without_attrim(columns: tuple[int, ...], right: bool) -> None:
    torch.manual_seed(0)
    model, x = _Two().double(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    kept = [0, 2, 5]
    small = copy.deepcopy(model)
    small.norm.num_channels = 3
    cuts = {}
    rows = [("a.weight", 0), ("a.bias", 0), ("norm.weight", 0), ("norm.bias", 0)]
    for name, dim, keep in [*((name, dim, kept) for name, dim in rows), ("b.weight", 1, list(columns))]:
        module, _, leaf = name.partition(".")
        old = getattr(getattr(model, module), leaf)
        setattr(getattr(small, module), leaf, nn.Parameter(old.detach().index_select(dim, torch.tensor(keep))))
        cuts[name] = Cut(tuple(old.shape), {dim: tuple(kept)})
    error = oracle_error(model, small, attrim.PruningPlan("", cuts), x)
    assert error is not None
    assert (error < 1e-12) == right
    assert right or error > 1e-3
