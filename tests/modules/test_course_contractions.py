"""What a watched contraction is told to be, against the operator's own result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attrim.modules.course.contractions import Contraction, ContractionWatch, patches
from attrim.modules.course.rows import input_rows, output_rows, places
from nets import filled, image


def seen(weight: Tensor, call) -> tuple[list[Contraction], Tensor]:
    found: list[Contraction] = []
    with torch.no_grad(), ContractionWatch({"w": weight}, found.append):
        result = call()
    return found, result


CONVOLUTIONS = {
    "1x1": (nn.Conv2d(6, 4, 1), (2, 6, 5, 4)),
    "3x3": (nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 4)),
    "odd": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)), (2, 6, 7, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 4)),
    "depthwise": (nn.Conv2d(6, 12, 3, stride=2, groups=6), (2, 6, 7, 7)),
    "same": (nn.Conv2d(6, 4, 3, padding="same", dilation=2), (2, 6, 7, 7)),
    "one dimension": (nn.Conv1d(6, 4, 3, padding=2, stride=3), (2, 6, 11)),
    "three dimensions": (nn.Conv3d(6, 4, 2, padding=1, groups=2), (2, 6, 3, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_weights_times_rows_are_the_outputs(name):
    conv, shape = CONVOLUTIONS[name]
    conv = filled(conv.double())
    x = image(*shape, dtype=torch.float64)
    (use,), y = seen(conv.weight, lambda: conv(x))
    total = len(use.inputs) * use.outputs
    assert (use.tensor, use.dim, total) == ("w", 1, y[:, 0].numel())
    at = places(total, 30, 1)
    rows = input_rows(use, at)
    assert rows.shape == (len(at), conv.groups, use.weight.shape[2], use.weight.shape[3])
    found = torch.einsum("rbct,boct->rbo", rows, use.weight).flatten(1) + conv.bias
    torch.testing.assert_close(found, output_rows(y, use, at, False), rtol=0, atol=1e-12)
    whole = torch.einsum("bkr,bok->rbo", patches(use), use.weight.flatten(2)).flatten(1) + conv.bias
    torch.testing.assert_close(whole, output_rows(y, use, torch.arange(total), False), rtol=0, atol=1e-12)


X = image(3, 5, 6, dtype=torch.float64)
W = image(4, 6, seed=1, dtype=torch.float64)
PRODUCTS = {
    "linear": (lambda: F.linear(X, W), 1, False),
    "linear with bias": (lambda: F.linear(X, W, torch.ones(4, dtype=torch.float64)), 1, False),
    "mm": (lambda: X[0] @ W.T, 1, False),
    "left": (lambda: W @ X[0].T, 1, True),
    "einsum": (lambda: torch.einsum("bnc,oc->bno", X, W), 1, False),
    "inputs first": (lambda: X[0][:, :4] @ W, 0, False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name):
    call, dim, flipped = PRODUCTS[name]
    (use,), y = seen(W, call)
    assert (use.tensor, use.dim, use.outputs, use.window) == ("w", dim, 1, None)
    at = torch.arange(len(use.inputs))
    found = torch.einsum("rbct,boct->rbo", input_rows(use, at), use.weight).flatten(1)
    shift = 1 if "bias" in name else 0
    expected = y.flatten(0, -2) if y.ndim == 3 and name != "einsum" else y
    expected = output_rows(expected if name != "einsum" else y.reshape(1, -1, 4), use, at, flipped)
    torch.testing.assert_close(found + shift, expected, rtol=0, atol=1e-12)


def test_parts_of_a_packed_weight_are_told_apart():
    packed = image(9, 6, seed=2, dtype=torch.float64)
    uses, _ = seen(packed, lambda: [F.linear(X, w) for w in packed.chunk(3)])
    assert [use.offset for use in uses] == [0, 18, 36]
    assert all(torch.equal(use.weight[0, :, :, 0], w) for use, w in zip(uses, packed.chunk(3), strict=True))


def test_a_transposed_convolution_has_no_window_and_contracts_the_first_dimension():
    conv = filled(nn.ConvTranspose2d(6, 4, 2, groups=2))
    (use,), _ = seen(conv.weight, lambda: conv(image(2, 6, 3, 3)))
    assert (use.dim, use.window) == (0, None)


def test_other_weights_and_other_operators_are_not_seen():
    other = torch.randn(4, 6, dtype=torch.float64)
    assert seen(W, lambda: F.linear(X, other))[0] == []
    assert seen(W, lambda: (W * 2).sum() + (W.softmax(1)).mean())[0] == []
    batched = image(3, 6, 2, seed=2, dtype=torch.float64)
    assert seen(batched, lambda: X @ batched)[0] == []  # a matrix for each sample is no single contraction


def test_positions_are_random_and_the_same_for_the_same_seed():
    assert places(10, 10, 0).tolist() == list(range(10))
    assert places(10, 99, 0).tolist() == list(range(10))
    at = places(10_000, 500, 3)
    assert torch.equal(at, places(10_000, 500, 3))
    assert not torch.equal(at, places(10_000, 500, 4))
    assert (int(at.min()) >= 0, int(at.max()) < 10_000) == (True, True)
    assert 4500 < float(at.double().mean()) < 5500
