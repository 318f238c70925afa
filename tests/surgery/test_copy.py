"""What the smaller copy keeps of the original besides the values: precision, layout, flags, ties, hooks, notes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim import PruningPlan
from attrim.errors import InputError
from nets import Plain, Residual, filled, image


def plan_of(model: nn.Module, example: Tensor | None = None) -> PruningPlan:
    """Keeps channels 0, 3, 5 of the first layer and 1, 2, 8, 11 of the second."""
    example = image(dtype=next(model.parameters()).dtype) if example is None else example
    return attrim.plan_from_kept(attrim.trace(model, example), {"conv1": [0, 3, 5], "conv2": [1, 2, 8, 11]})


def test_the_values_are_those_of_the_kept_positions() -> None:
    model = filled(Plain())
    small = attrim.apply(model, plan_of(model))
    assert torch.equal(small.conv1.weight, model.conv1.weight[[0, 3, 5]])
    assert torch.equal(small.bn1.running_var, model.bn1.running_var[[0, 3, 5]])
    assert torch.equal(small.conv2.weight, model.conv2.weight[[1, 2, 8, 11]][:, [0, 3, 5]])
    assert torch.equal(small.head.weight, model.head.weight[:, [1, 2, 8, 11]])
    assert torch.equal(small.head.bias, model.head.bias)
    assert small.bn1.num_batches_tracked.item() == model.bn1.num_batches_tracked.item()


def test_no_storage_is_shared_with_the_original() -> None:
    model = filled(Plain())
    small = attrim.apply(model, plan_of(model))
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    theirs = {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers())}
    assert not ours & theirs
    assert {type(m) for m in small.modules()} == {type(m) for m in model.modules()}
    assert not {id(m) for m in small.modules()} & {id(m) for m in model.modules()}


def test_no_storage_is_larger_than_it_has_to_be() -> None:
    model = filled(Plain())
    small = attrim.apply(model, plan_of(model))
    for name, tensor in small.named_parameters():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_stays(dtype: torch.dtype) -> None:
    model = filled(Plain()).to(dtype)
    small = attrim.apply(model, plan_of(model))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small.bn1.running_mean.dtype == dtype
    assert small.bn1.num_batches_tracked.dtype == torch.int64
    assert small(image(dtype=dtype)).dtype == dtype


def test_mixed_precisions_stay_mixed() -> None:
    model = filled(Plain())
    model.head.double()
    small = attrim.apply(model, plan_of(filled(Plain())))
    assert (small.conv1.weight.dtype, small.head.weight.dtype) == (torch.float32, torch.float64)


def test_channels_last_stays() -> None:
    model = filled(Plain()).to(memory_format=torch.channels_last)
    small = attrim.apply(model, plan_of(model))
    for weight in (small.conv1.weight, small.conv2.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    assert small.conv2.weight.stride() == (27, 1, 9, 3)
    assert small.head.weight.is_contiguous()
    plain = attrim.apply(filled(Plain()), plan_of(model))
    assert plain.conv2.weight.stride() == (27, 9, 3, 1)


def test_channels_last_stays_in_three_dimensions() -> None:
    model = filled(nn.Sequential(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Conv3d(6, 4, 2)))
    model = model.to(memory_format=torch.channels_last_3d)
    plan = attrim.plan_from_kept(attrim.trace(model, image(1, 2, 5, 5, 5)), {"0": [1, 4, 5]})
    small = attrim.apply(model, plan)
    assert small[2].weight.shape == (4, 3, 2, 2, 2)
    assert small[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not small[2].weight.is_contiguous()


def test_requires_grad_stays_for_each_parameter() -> None:
    model = filled(Plain())
    model.conv1.requires_grad_(False)
    model.bn2.bias.requires_grad_(False)
    small = attrim.apply(model, plan_of(model))
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"conv1.weight", "bn2.bias"}
    assert all(p.is_leaf and p.grad is None for p in small.parameters())
    small(image()).sum().backward()
    assert {n for n, p in small.named_parameters() if p.grad is None} == {"conv1.weight", "bn2.bias"}


def test_gradients_stay_with_the_original() -> None:
    model = filled(Plain())
    model(image()).sum().backward()
    before = model.conv1.weight.grad.clone()
    assert attrim.apply(model, plan_of_fresh()).conv1.weight.grad is None
    assert torch.equal(model.conv1.weight.grad, before)


def plan_of_fresh() -> PruningPlan:
    return plan_of(filled(Plain()))


@pytest.mark.parametrize("training", [True, False])
def test_the_train_flag_stays_for_each_module(training: bool) -> None:
    model = filled(Plain()).train(training)
    model.bn1.train(not training)
    small = attrim.apply(model, plan_of(model))
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert (small.training, small.bn1.training, small.bn2.training) == (training, not training, training)


def test_hooks_of_the_copy_work_and_do_not_touch_the_original() -> None:
    model = filled(Plain())
    model.seen = []
    model.conv2.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.head.register_forward_hook(lambda module, args, out: out + 1)
    model.register_forward_hook(remember)
    small = attrim.apply(model, plan_of(model))
    x = image()
    out = small(x)
    hidden = small.bn2(
        nn.functional.conv2d(small.bn1(small.conv1(x)).relu() * 2, small.conv2.weight, small.conv2.bias, padding=1)
    )
    expected = nn.functional.linear(hidden.relu().mean((2, 3)), small.head.weight, small.head.bias) + 1
    assert torch.allclose(out, expected, atol=1e-5)
    assert (small.seen, model.seen) == ([(2, 5)], [])


def remember(module: Any, args: Any, out: Tensor) -> None:
    module.seen.append(tuple(out.shape))


class Marked(nn.Parameter):
    """A parameter class of someone's own."""


def test_attributes_of_parameters_stay() -> None:
    model = filled(Plain())
    model.conv1.weight.learning_rate = 0.1
    model.conv2.weight = Marked(model.conv2.weight.data)
    model.conv2.weight.note = {"of": "mine"}
    small = attrim.apply(model, plan_of(model))
    assert small.conv1.weight.learning_rate == 0.1
    assert small.conv2.weight.note == {"of": "mine"}
    assert "_attrim_value" not in vars(small.conv2.weight)


def test_the_class_of_a_parameter_is_kept() -> None:
    model = filled(Plain())
    model.conv2.weight = Marked(model.conv2.weight.data)
    small = attrim.apply(model, plan_of(model))
    assert type(small.conv2.weight) is Marked
    assert small.conv2.weight.shape == (4, 3, 3, 3)


def test_buffers_and_plain_attributes_come_along() -> None:
    model = filled(Plain())
    model.register_buffer("palette", torch.arange(4.0), persistent=False)
    model.config = {"widths": [8, 12]}
    small = attrim.apply(model, plan_of(model))
    assert torch.equal(small.palette, torch.arange(4.0))
    assert "palette" not in small.state_dict()
    assert small.config == {"widths": [8, 12]}
    assert small.config is not model.config


def test_ties_stay_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.c.weight, self.c.bias = self.b.weight, self.b.bias
            self.twin = self.b
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.twin(self.c(self.b(self.a(x)).relu()).relu()))

    model = filled(Tied())
    small = attrim.apply(model, attrim.plan_from_kept(attrim.trace(model, image(2, 4)), {"a": [1, 2, 5]}))
    assert small.c.weight is small.b.weight
    assert small.c.bias is small.b.bias
    assert small.twin is small.b
    assert (small.c.in_features, small.c.out_features) == (3, 3)
    assert len(list(small.parameters())) == len(list(model.parameters()))


def test_only_modules_are_cut() -> None:
    with pytest.raises(InputError, match=r"expected an nn\.Module to cut, found OrderedDict"):
        attrim.apply(Plain().state_dict(), plan_of_fresh())


def test_a_cut_network_learns() -> None:
    model = filled(Plain())
    small = attrim.apply(model, plan_of(model)).train()
    optimizer, x, y = torch.optim.SGD(small.parameters(), lr=0.05), image(16, 3, 8, 8), torch.arange(16) % 5
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_shared_parameters_are_the_models_own_and_buffers_are_not() -> None:
    model = filled(Residual())
    channels = attrim.trace(model, image(1, 3, 16, 16))
    plan = attrim.plan_from_kept(channels, {channels.cost.groups[0]: [0, 2]})
    shared, copied = attrim.apply(model, plan, share=True), attrim.apply(model, plan)
    own, mine, other = (dict(m.named_parameters()) for m in (model, shared, copied))
    for name in own:
        assert (mine[name] is own[name]) == (name not in plan.cuts)
        assert other[name] is not own[name]
    buffers = dict(model.named_buffers())
    assert all(tensor is not buffers[name] for name, tensor in shared.named_buffers())
    x = image(2, 3, 16, 16)
    assert torch.equal(shared(x), copied(x))
