"""Shared modules and tied weights: one tensor, labelled once, counted once, cut once, still shared afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attrim
from nets import filled, image, kept_at_random


class Recurring(nn.Module):
    """One convolution and one norm, applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.norm(self.body(x)).relu()
        return self.head(x)


class Tied(nn.Module):
    """Two layers with one weight, and a third name for one of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.third.weight = self.second.weight
        self.again = self.second
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((self.third(self.second(x).relu()) + self.again(x)).relu())


class Language(nn.Module):
    """An output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.inner(self.embed(words)).relu())


def test_a_module_that_runs_three_times_is_counted_three_times_and_stored_once() -> None:
    model = filled(Recurring())
    channels = attrim.trace(model, image())
    assert {g.id: g.size for g in channels} == {"stem": 8}
    axes = [str(m.axis) for m in channels["stem"].members]
    assert len(axes) == len(set(axes)) == 10
    positions = 2 * 8 * 8
    assert channels.cost.macs() == positions * (3 * 8 + 3 * 9 * 8 * 8 + 8 * 2)
    assert channels.cost.macs([3]) == positions * (3 * 3 + 3 * 9 * 3 * 3 + 3 * 2)
    assert channels.cost.params([3]) == (9 + 3) + (81 + 3) + 6 + (6 + 2)


def test_a_tied_weight_has_one_name_and_is_counted_once() -> None:
    model = filled(Tied())
    channels = attrim.trace(model, image(2, 6))
    assert channels.aliases == {
        "third.weight": "second.weight",
        "again.weight": "second.weight",
        "again.bias": "second.bias",
    }
    assert "third.weight" not in channels.shapes
    assert channels.cost.params() == sum(p.numel() for p in model.parameters()) == 223
    assert "third.weight:0" not in {str(m.axis) for g in channels for m in g.members}
    assert channels.explain("third.weight:1") == channels.explain("second.weight:1")
    assert channels.explain("third.weight").startswith("second.weight (10, 10)")


def test_ties_force_input_and_output_of_the_shared_weight_together() -> None:
    channels = attrim.trace(filled(Tied()), image(2, 6))
    assert {g.id: g.size for g in channels} == {"first": 10}
    assert {str(m.axis) for m in channels["first"].members} == {
        "first.weight:0", "first.bias:0", "second.weight:0", "second.weight:1", "second.bias:0", "third.bias:0",
        "head.weight:1",
    }  # fmt: skip


def test_tied_weights_stay_tied_after_the_cut() -> None:
    model = filled(Tied())
    plan = attrim.plan_from_kept(attrim.trace(model, image(2, 6)), {"first": [0, 4, 5, 9]})
    small = attrim.apply(model, plan)
    assert small.third.weight is small.second.weight
    assert small.again is small.second
    assert torch.equal(small.second.weight, model.second.weight[[0, 4, 5, 9]][:, [0, 4, 5, 9]])
    assert (small.third.in_features, small.third.out_features) == (4, 4)
    assert plan.provenance["params_after"] == sum(p.numel() for p in small.parameters()) == 4 * 6 + 4 + 16 + 8 + 12 + 3
    assert attrim.verify(model, small, plan, image(2, 6)).max_error < 1e-12


def test_an_output_layer_tied_to_the_embedding_loses_columns_only() -> None:
    model, words = filled(Language()), torch.arange(10).view(2, 5)
    channels = attrim.trace(model, words)
    assert {str(m.axis) for m in channels["embed"].members} == {
        "embed.weight:1", "inner.weight:0", "inner.weight:1", "inner.bias:0",
    }  # fmt: skip
    assert "all pinned: rows are looked up by number" in channels.explain("out.weight:0")
    plan = kept_at_random(channels)
    small = attrim.apply(model, plan)
    assert small.out.weight is small.embed.weight
    assert small.embed.embedding_dim == small.out.in_features == plan.groups["embed"]["kept"]
    assert attrim.verify(model, small, plan, words).ok
