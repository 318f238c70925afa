from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attrim.errors import DataError
from attrim.modules.batches import batch_source, device_of, logits_of, read_batch, run_batch, to_device

CPU = torch.device("cpu")
X = torch.arange(6.0).reshape(3, 2)
Y = torch.tensor([0, 1, 1])


def test_a_tensor_is_an_input_without_labels() -> None:
    batch = read_batch(X, CPU)
    assert (len(batch.args), batch.labels, batch.size) == (1, None, 3)
    assert torch.equal(batch.args[0], X)


@pytest.mark.parametrize("pair", [(X, Y), [X, Y]])
def test_a_pair_is_input_and_labels(pair) -> None:
    batch = read_batch(pair, CPU)
    assert len(batch.args) == 1
    assert torch.equal(batch.args[0], X)
    assert torch.equal(batch.labels, Y)
    assert type(batch.raw) is type(pair)


def test_the_last_of_several_holds_the_labels() -> None:
    batch = read_batch((X, 2 * X, Y), CPU)
    assert [a.sum().item() for a in batch.args] == [15, 30]
    assert torch.equal(batch.labels, Y)
    assert read_batch((X,), CPU).labels is None


def test_nested_inputs_are_spread() -> None:
    batch = read_batch(((X, 2 * X), Y), CPU)
    assert [a.sum().item() for a in batch.args] == [15, 30]
    batch = read_batch(({"x": X, "mask": Y}, Y), CPU)
    assert (batch.args, list(batch.kwargs), batch.size) == ((), ["x", "mask"], 3)
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_dict_entries_with_a_label_name_are_labels(key) -> None:
    batch = read_batch({"pixel_values": X, key: Y}, CPU)
    assert list(batch.kwargs) == ["pixel_values"]
    assert torch.equal(batch.labels, Y)
    assert key in batch.raw


def test_numpy_arrays_become_tensors() -> None:
    batch = read_batch((X.numpy(), np.array([0, 1, 1])), CPU)
    assert torch.equal(batch.args[0], X)
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("cat.png", "found str"),
        (None, "found NoneType"),
        ((), "found tuple"),
        (["a", "b"], "expected a tensor among the inputs of a batch, found a list of str, str"),
        ({"labels": Y}, "expected a tensor among the inputs of a batch, found a dict with the keys labels"),
    ],
)
def test_what_is_no_batch(batch, message) -> None:
    with pytest.raises(DataError, match=message):
        read_batch(batch, CPU)


def test_everything_moves_in_its_container() -> None:
    Pair = namedtuple("Pair", "x y")
    moved = to_device({"a": [X, (Y,)], "b": Pair(X, "text")}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert isinstance(moved["b"], Pair)
    assert moved["b"].x.is_meta
    assert moved["b"].y == "text"
    assert read_batch((X, Y), torch.device("meta")).labels.is_meta


def test_the_device_of_a_model() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(3, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


@pytest.mark.parametrize(
    "source", [[X, X], iter([X]), (X, X), ((X, Y), (X, Y)), torch.utils.data.DataLoader(X), [(X, Y)], {X: 1}.keys()]
)
def test_sources(source) -> None:
    assert batch_source(source) is source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (X, r"found one tensor of shape \(3, 2\). Put it in a list: \[batch\]"),
        (X.numpy(), "found one tensor"),
        ({"x": X}, "found one dict with the keys x"),
        ((X, Y), "found one .inputs, labels. pair"),
        (None, "an iterable of batches .*, found NoneType"),
        ("data/", "an iterable of batches .*, found str"),
    ],
)
def test_what_is_no_source(source, message) -> None:
    with pytest.raises(DataError, match=message):
        batch_source(source)


class TwoInputs(nn.Module):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return x * scale + shift


def test_running_a_batch() -> None:
    model = TwoInputs()
    assert torch.equal(run_batch(model, read_batch(X, CPU)), X)
    assert torch.equal(run_batch(model, read_batch((X, X, Y), CPU)), X * X)
    assert torch.equal(run_batch(model, read_batch({"x": X, "shift": X}, CPU)), 2 * X)
    assert torch.equal(run_batch(model, read_batch({"x": X, "labels": Y}, CPU)), X)


def test_a_single_entry_of_another_name_goes_in_by_position() -> None:
    assert torch.equal(run_batch(TwoInputs(), read_batch({"image": X, "label": Y}, CPU)), X)
    with pytest.raises(TypeError, match="image"):
        run_batch(TwoInputs(), read_batch({"image": X, "scale": X}, CPU))


def test_logits() -> None:
    for outputs in (X, (X, "hidden"), [X], {"logits": X}, {"out": X}, SimpleNamespace(logits=X)):
        assert logits_of(outputs) is X
    for outputs, message in [({"loss": X}, "a dict with the keys loss"), ("no", "str"), ((), "a tuple of nothing")]:
        with pytest.raises(DataError, match=f"expected class scores .* found {message}.*Pass your own loss"):
            logits_of(outputs)
