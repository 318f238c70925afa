"""A run that is taken up in the middle gives what the whole run gives, on every pattern network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attrim.methods.fast.boundary import boundary, changed_later
from attrim.methods.fast.folding import foldable, folded
from attrim.methods.fast.recording import record
from attrim.methods.fast.resume import keeping, resuming
from attrim.modules.batches import Batch
from nets import Mobile, Residual, filled, image
from zoo import REGISTRY, Pattern


def batch_of(inputs: Any) -> Batch:
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return Batch(args, kwargs, None, int(first.shape[0]), None)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@torch.no_grad()
def resumed_everywhere(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """Take the run up before the first use of every tensor; how many of these runs were right, and how many there were."""
    batch = batch_of(inputs)
    recording = record(copy.deepcopy(model), batch)
    expected = tensors(model(*batch.args, **batch.kwargs))
    right = tried = 0
    for at in sorted(set(recording.first_use(model).values())):
        where = boundary(recording, at)
        if not where.real:
            continue
        kept: dict[Any, Any] = {}
        with keeping(
            dict(model.named_modules()), where.real, where.skipped - where.real, changed_later(recording), None, kept
        ):
            model(*batch.args, **batch.kwargs)
        for _ in range(2):  # the second time shows whether the first has changed what was kept
            with resuming(dict(model.named_modules()), where, kept):
                found = tensors(model(*batch.args, **batch.kwargs))
        tried += 1
        right += all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected, strict=True))
    assert all(module.__dict__.get("forward") is None for module in model.modules())
    return right, tried


@pytest.mark.parametrize("pattern", [REGISTRY[name] for name in sorted(REGISTRY)], ids=lambda p: p.name)
def test_every_place_of_every_pattern(pattern: Pattern) -> None:
    model, inputs = pattern.build()
    right, tried = resumed_everywhere(model, inputs)
    assert right == tried


def test_a_residual_network_skips_its_blocks_and_keeps_one_tensor_at_each_place() -> None:
    model = filled(Residual()).double()
    x = image(2, 3, 16, 16, dtype=torch.float64)
    recording = record(model, batch_of(x))
    use = recording.first_use(model)
    where = boundary(recording, use["layers.3.conv1.weight"])
    assert {path for path, _ in where.skipped} == {"conv1", "bn1", "layers.0", "layers.1", "layers.2"}
    assert {path for path, _ in where.real} == {"layers.2"}
    right, tried = resumed_everywhere(model, x)
    assert right == tried >= 12


def test_skipped_modules_do_not_run() -> None:
    model = filled(Residual())
    x = image(2, 3, 16, 16)
    recording = record(model, batch_of(x))
    where = boundary(recording, recording.first_use(model)["layers.4.conv2.weight"])
    kept: dict[Any, Any] = {}
    with torch.no_grad(), keeping(dict(model.named_modules()), where.real, where.skipped - where.real, (), None, kept):
        model(x)
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, a, o, path=path: ran.append(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad(), resuming(dict(model.named_modules()), where, kept):
        model(x)
    for handle in handles:
        handle.remove()
    real = [path for path in ran if (path, 0) not in where.skipped]
    assert real == ["layers.4.conv2", "layers.4.down.0", "layers.5.conv1", "layers.5.conv2"]


class Ignored(nn.Module):
    """The in-place activation's return value is thrown away: later code sees it all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        self.relu(y)
        z = self.conv2(y)
        return self.conv3(z) + z.relu_()


@torch.no_grad()
def test_what_cannot_be_taken_up_shows_in_numbers_not_silently() -> None:
    """This is what FastObjective looks at before it uses a place."""
    model = filled(Ignored()).double()
    x = image(2, 3, 8, 8, dtype=torch.float64)
    right, tried = resumed_everywhere(model, x)
    assert tried == 2
    assert right < tried


@pytest.mark.parametrize("make", [Residual, Mobile])
def test_folded_batch_norms_give_the_same_and_come_back(make: type[nn.Module]) -> None:
    model = filled(make()).double()
    x = image(2, 3, 32, 32, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pairs = foldable(model, record(model, batch_of(x)))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(pairs) == len(norms)
    with torch.no_grad():
        expected = model(x)
        with folded(model, pairs):
            assert torch.allclose(model(x), expected, rtol=1e-10)
            norms[0].running_mean += 1.0  # nobody looks at it any more
            assert torch.allclose(model(x), expected, rtol=1e-10)
            norms[0].running_mean -= 1.0
    assert model.state_dict().keys() == before.keys()
    assert all(torch.allclose(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_norm_whose_input_is_read_elsewhere_is_not_folded() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = filled(Read())
    assert foldable(model, record(model, batch_of(image()))) == []
