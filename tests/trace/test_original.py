"""The original is bitwise unchanged by everything: values, flags, gradients, hooks, attributes, random state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from nets import Attention, Plain, filled, image, random_scores


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that could be changed, copied."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {
        "values": {n: t.detach().clone() for n, t in tensors},
        "objects": {n: (id(t), t.data_ptr(), t._version) for n, t in tensors},
        "flags": {n: (t.requires_grad, t.dtype, t.stride(), t.device) for n, t in tensors},
        "gradients": {n: None if t.grad is None else t.grad.clone() for n, t in tensors},
        "notes": {n: sorted(vars(t)) for n, t in tensors},
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [{k: v for k, v in vars(m).items() if isinstance(v, (int, tuple, str))} for m in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("objects", "flags", "notes", "training", "hooks", "attributes"):
        assert before[part] == after[part], part
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
        gradient, now = before["gradients"][name], after["gradients"][name]
        assert (gradient is None) == (now is None), name
        assert gradient is None or torch.equal(gradient, now), name


def prepared(model: nn.Module, example: Tensor) -> tuple[nn.Module, list[str]]:
    """In training mode, with gradients, one frozen parameter, one module in eval mode, and a hook that keeps count."""
    model = filled(model).train()
    model(example).sum().backward()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    calls: list[str] = []
    list(model.children())[-1].register_forward_hook(lambda module, args, out: calls.append("forward"))
    return model, calls


def everything(model: nn.Module, example: Tensor) -> None:
    channels = attrim.trace(model, example, check=True)
    attrim.score(model, channels, "l2")
    plan = attrim.allocate(channels, random_scores(channels), attrim.Budget(params=0.6))
    small = attrim.apply(model, plan)
    attrim.verify(model, small, plan, example)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()


def pruned_and_tuned(model: nn.Module, example: Tensor) -> None:
    data = [(example, torch.zeros(len(example), dtype=torch.long))] * 2
    attrim.prune(model, example, method="taylor", budget=attrim.Budget(params=0.6), data=data, recover="free")


ACTS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "trace": attrim.trace,
    "the five steps": everything,
    "prune": pruned_and_tuned,
}


@pytest.mark.filterwarnings("ignore::attrim.AttrimWarning")
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
@pytest.mark.parametrize(("net", "shape"), [(Plain, (4, 3, 8, 8)), (Attention, (2, 7, 12))], ids=["images", "tokens"])
def test_nothing_of_the_original_changes(
    act: Callable[[nn.Module, Tensor], object], net: type[nn.Module], shape: tuple[int, ...]
) -> None:
    example = image(*shape)
    model, _ = prepared(net(), example)
    before, seen, inputs = state(model), torch.get_rng_state(), example.clone()
    act(model, example)
    assert_same(before, state(model))
    assert torch.equal(example, inputs)
    assert not hasattr(example, "_attrim_value")
    assert torch.equal(torch.get_rng_state(), seen)


def test_a_failed_trace_changes_nothing_either() -> None:
    model, _ = prepared(Plain(), image())
    before, grad = state(model), torch.is_grad_enabled()
    with pytest.raises(attrim.AttrimError):
        attrim.trace(model, image(1, 5, 8, 8))
    assert_same(before, state(model))
    assert torch.is_grad_enabled() == grad
    assert torch.get_default_dtype() == torch.float32


def test_global_switches_are_put_back() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    onednn = torch.backends.mkldnn.enabled
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    example = image(2, 4, dtype=torch.float64)
    channels = attrim.trace(model, example)
    plan = attrim.plan_from_kept(channels, {"0": [1, 2]})
    attrim.verify(model, attrim.apply(model, plan), plan, example)
    assert torch.backends.mha.get_fastpath_enabled() is True
    assert torch.backends.mkldnn.enabled == onednn
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert nn.Linear(2, 2)(torch.zeros(1, 2)).grad_fn is not None


def test_a_recurrent_network_leaves_the_kernels_as_they_were() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    onednn = torch.backends.mkldnn.enabled
    attrim.trace(Reader(), image(2, 5, 4))
    assert torch.backends.mkldnn.enabled == onednn


def test_two_traces_of_one_model_are_identical() -> None:
    model, example = filled(Attention()), image(2, 7, 12)
    first, second = attrim.trace(model, example), attrim.trace(model, example)
    assert first.table() == second.table()
    assert first.fingerprint == second.fingerprint
    assert list(first.groups) == list(second.groups)
    assert first.attributes == second.attributes
    for a, b in zip(first, second, strict=True):
        assert (a.kind, a.effects, [t.module for t in a.taps]) == (b.kind, b.effects, [t.module for t in b.taps])
        assert [(m.axis, m.role, m.index.tolist()) for m in a.members] == [
            (m.axis, m.role, m.index.tolist()) for m in b.members
        ]
    for kept in ([3, 1], [20, 4], [11, 2]):
        assert (first.cost.macs(kept), first.cost.params(kept)) == (second.cost.macs(kept), second.cost.params(kept))
