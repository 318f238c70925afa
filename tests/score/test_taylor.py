from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attrim.errors import CriterionError, DataError
from attrim.score import score


def batches(count: int, size: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def taylor(model, channels, data, **options) -> torch.Tensor:
    options.setdefault("normalize", "none")
    return next(iter(score(model, channels, "taylor", data, **options).values.values())).double()


def loss_with_columns_scaled(model: nn.Module, channel: int, factor: float, x, y) -> torch.Tensor:
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        other.conv2.weight[:, channel] *= factor
        return cross_entropy(other(x), y)


def test_it_is_the_first_order_change_of_the_loss(small, small_map) -> None:
    small.double()
    ((x, y),) = batches(1, 8)
    value = taylor(small, small_map(small), [(x, y)], power=1)
    step = 1e-5
    for channel in range(3):
        up, down = (loss_with_columns_scaled(small, channel, 1 + s, x, y) for s in (step, -step))
        assert value[channel].item() == pytest.approx(abs(float(up - down)) / (2 * step), rel=1e-5)


def test_it_equals_the_gradient_of_a_gate_on_the_channel(small, small_map) -> None:
    small.double().eval()
    ((x, y),) = batches(1, 8)
    gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gated = small.conv2(small.relu(small.norm(small.conv1(x))) * gate[:, None, None]).mean((2, 3))
    (expected,) = torch.autograd.grad(cross_entropy(gated, y), gate)
    channels = small_map(small)
    assert torch.allclose(taylor(small, channels, [(x, y)]), expected.square(), rtol=1e-6)
    assert torch.allclose(taylor(small, channels, [(x, y)], power=1), expected.abs(), rtol=1e-6)
    assert torch.allclose(taylor(small, channels, [(x, y)], joint="group"), expected.square(), rtol=1e-6)
    # For a positively homogeneous activation the paper's gate on the norm is the same gate.
    at_norm = taylor(small, channels, [(x, y)], roles=("scale", "shift"), power=1, joint="group")
    assert torch.allclose(at_norm, expected.abs(), rtol=1e-6)


def test_a_channel_with_two_consumers_counts_both_with_their_signs(build) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.a(x)
            return self.b(hidden) + self.c(hidden)

    torch.manual_seed(3)
    model = Fork().double()
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
    hidden = model.a(x) * gate
    (expected,) = torch.autograd.grad(cross_entropy(model.b(hidden) + model.c(hidden), y), gate)
    consumers = [build.member("b.weight:1", 3, "in"), build.member("c.weight:1", 3, "in")]
    channels = build.map(model, build.group("a", [build.member("a.weight:0", 3, "out"), *consumers]))
    assert torch.allclose(taylor(model, channels, [(x, y)], power=1, joint="group"), expected.abs(), rtol=1e-6)

    grads = torch.autograd.grad(cross_entropy(model(x), y), [model.b.weight, model.c.weight])
    products = [w.detach() * g for w, g in zip((model.b.weight, model.c.weight), grads, strict=True)]
    by_member = torch.stack([p.sum(0) for p in products])
    by_element = torch.stack([p.abs().sum(0) for p in products])
    assert torch.allclose(taylor(model, channels, [(x, y)]), by_member.square().mean(0), rtol=1e-6)
    options = {"joint": "member", "reduction": "sum"}
    assert torch.allclose(taylor(model, channels, [(x, y)], **options), by_member.square().sum(0), rtol=1e-6)
    options = {"joint": "element", "reduction": "max", "power": 1}
    assert torch.allclose(taylor(model, channels, [(x, y)], **options), by_element.amax(0), rtol=1e-6)


def test_filters_can_be_read_instead(small, small_map) -> None:
    small.double().eval()
    ((x, y),) = batches(1, 8)
    (grad,) = torch.autograd.grad(cross_entropy(small(x), y), small.conv1.weight)
    expected = (small.conv1.weight.detach() * grad).sum((1, 2, 3)).square()
    assert torch.allclose(taylor(small, small_map(small), [(x, y)], roles=("out",)), expected, rtol=1e-6)


def test_producers_stand_in_where_nothing_consumes(small, build) -> None:
    small.double().eval()
    ((x, y),) = batches(1, 8)
    (grad,) = torch.autograd.grad(cross_entropy(small(x), y), small.conv1.weight)
    channels = build.map(small, build.group("g", [build.member("conv1.weight:0", 3, "out")]))
    expected = (small.conv1.weight.detach() * grad).sum((1, 2, 3)).square()
    assert torch.allclose(taylor(small, channels, [(x, y)]), expected, rtol=1e-6)


def test_streaming_the_data_equals_one_big_batch(small, small_map) -> None:
    small.double()
    pieces = [*batches(3, 5), *batches(1, 2, seed=7)]
    whole = [(torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces]))]
    channels = small_map(small)
    assert torch.allclose(
        taylor(small, channels, pieces, per="data"), taylor(small, channels, whole, per="data"), rtol=1e-6
    )
    mean = sum(len(y) * taylor(small, channels, [(x, y)]) for x, y in pieces) / 17
    assert torch.allclose(taylor(small, channels, pieces), mean, rtol=1e-6)


def test_memory_does_not_grow_with_the_data(small, small_map) -> None:
    small.double()
    alive = []

    def source(count: int):
        for x, y in batches(count, 4):
            yield x, y
            del x, y
            gc.collect()
            alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))

    taylor(small, small_map(small), source(8))
    assert len(alive) == 8
    assert len(set(alive[2:])) == 1


def test_own_loss_and_dict_batches(small, small_map) -> None:
    small.double()
    ((x, y),) = batches(1, 8)
    expected = taylor(small, small_map(small), [(x, y)])
    channels = small_map(small)
    assert torch.equal(taylor(small, channels, [{"x": x, "labels": y}]), expected)
    assert torch.equal(taylor(small, channels, [{"image": x, "label": y}]), expected)
    assert torch.equal(taylor(small, channels, [x], loss=lambda out, batch: cross_entropy(out, y)), expected)
    by_key = taylor(
        small, channels, [{"x": x, "labels": y}], loss=lambda out, batch: cross_entropy(out, batch["labels"])
    )
    assert torch.equal(by_key, expected)


def test_only_the_weights_in_question_require_gradients(small, small_map) -> None:
    small.double()
    asked = []

    def loss(outputs, batch):
        asked.append([n for n, p in small.named_parameters() if p.requires_grad])
        return outputs.square().mean()

    taylor(small, small_map(small), [batches(1, 2)[0][0]], loss=loss)
    assert asked == [["conv2.weight"]]


def test_groups_that_the_loss_does_not_reach(small, build) -> None:
    small.double()
    unused = nn.Linear(3, 3).double()
    small.extra = unused
    channels = build.map(small, build.group("extra", [build.member("extra.weight:1", 3, "in")]))
    message = r"cannot score 1 of 1 groups \(extra\): a group needs a weight that the loss depends on"
    with pytest.raises(CriterionError, match=message):
        taylor(
            small, channels, batches(1, 2), loss=lambda out, batch: out.square().mean() + small.conv2.weight.sum() * 0
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint": "all"}, "joint: expected group, member or element, found 'all'"),
        ({"power": 3}, "power: expected 1 or 2, found 3"),
        ({"per": "sample"}, "per: expected batch or data, found 'sample'"),
        ({"joint": "element", "per": "data"}, "Use per='batch'"),
        ({"reduction": "median"}, "reduction: expected one of mean"),
        ({"loss": lambda out, batch: out}, r"loss: expected one number per batch.*found \(2, 4\)"),
        ({"loss": lambda out, batch: 0.0}, r"loss: expected one number per batch.*found float"),
        ({"loss": lambda out, batch: out.sum() * float("nan")}, "the loss of a batch is nan"),
        (
            {"loss": lambda out, batch: out.detach().sum()},
            r"cannot score 1 of 1 groups .* a weight that the loss depends on \(no no_grad",
        ),
    ],
)
def test_wrong_options(options, message, small, small_map) -> None:
    with pytest.raises(CriterionError, match=message):
        taylor(small.double(), small_map(small), batches(1, 2), **options)


def test_labels_are_needed(small, small_map) -> None:
    ((x, _),) = batches(1, 2)
    for batch in (x, (x,), {"x": x}, (x, None)):
        with pytest.raises(CriterionError, match="'taylor' needs labels and a batch has none"):
            taylor(small.double(), small_map(small), [batch])
    with pytest.raises(DataError, match=r"expected a batch .* found str"):
        taylor(small, small_map(small), ["cat.png"])
