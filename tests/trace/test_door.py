"""What is refused at the door, and whether the message says what was expected, found, and the call that mends it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import InputError, TraceError
from nets import Plain, filled, image


class Locked(Plain):
    """Cannot be deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Remembers(Plain):
    """Keeps its last activation, which is no leaf of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Returns(nn.Module):
    """Runs a layer and returns something else."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.conv, self.result = nn.Conv2d(3, 4, 1), result

    def forward(self, x: Tensor) -> Any:
        self.conv(x)
        return self.result


def parallel() -> nn.Module:
    """The wrapper's type is enough; a process group is not at hand."""
    return nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)


def with_value(name: str, *values: float) -> nn.Module:
    model = filled(Plain())
    model.get_parameter(name).data.view(-1)[: len(values)] = torch.tensor(values)
    return model


NAN = float("nan")
INF = float("inf")

MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "a function": (lambda: torch.relu, ("expected a torch.nn.Module", "builtin_function_or_method")),
    "a state dict": (lambda: Plain().state_dict(), ("expected a torch.nn.Module", "OrderedDict")),
    "a class": (lambda: Plain, ("found <class", "Plain", "Call the class to make an instance")),
    "compiled": (lambda: torch.compile(Plain()), ("found a compiled model", "model._orig_mod")),
    "DataParallel": (lambda: nn.DataParallel(Plain()), ("DataParallel wrapper", "model.module")),
    "DistributedDataParallel": (parallel, ("DistributedDataParallel wrapper", "model.module")),
    "float16": (lambda: Plain().half(), ("'conv1.weight' is float16 on the CPU", "model.float(), then small.half()")),
    "NaN": (lambda: with_value("conv2.weight", NAN), ("'conv2.weight' holds NaN or infinite", "isfinite().all()")),
    "infinite": (lambda: with_value("head.bias", INF), ("'head.bias' holds NaN or infinite values",)),
    "inf - inf": (lambda: with_value("head.weight", INF, -INF), ("'head.weight' holds NaN or infinite values",)),
    "no parameters": (lambda: nn.Sequential(nn.ReLU()), ("Sequential has no parameters", "nothing to prune")),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), ("'0.weight' is not initialised", "Run one forward pass")),
}


@pytest.mark.parametrize(("make", "parts"), MODELS.values(), ids=MODELS)
def test_models_that_are_refused(make: Callable[[], Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        attrim.trace(make(), image())
    for part in ("model: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("example", ["1x3x8x8", None, 3, torch.ones(2).numpy()], ids=["str", "None", "int", "array"])
def test_example_inputs_of_another_kind_are_refused(example: Any) -> None:
    with pytest.raises(InputError) as caught:
        attrim.trace(Plain(), example)
    assert (
        f"expected a tensor, a tuple (positional arguments) or a dict (keyword arguments), found {type(example).__name__}"
        in str(caught.value)
    )
    assert "torch.randn(1, 3, 224, 224)" in str(caught.value)


@pytest.mark.parametrize("example", [(), {}, (3, "x")], ids=["tuple", "dict", "numbers"])
def test_example_inputs_without_a_tensor_are_refused(example: Any) -> None:
    with pytest.raises(InputError, match="expected at least one tensor, found none"):
        attrim.trace(Plain(), example)


def test_a_wrong_shape_names_the_line_the_torch_error_and_the_shape_given() -> None:
    with pytest.raises(TraceError) as caught:
        attrim.trace(Plain(), image(1, 4, 8, 8))
    text = str(caught.value)
    assert "the model (Plain) does not run on the example inputs" in text
    assert "expected input[1, 4, 8, 8] to have 3 channels, but got 4 channels" in text
    assert "(aten.convolution, in module 'conv1', at " in text
    assert "nets.py:" in text
    assert "The inputs were (1, 4, 8, 8) float32" in text
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_wrong_dtype_and_wrong_arguments_are_told_apart() -> None:
    with pytest.raises(TraceError, match=r"expected scalar type Double but found Float.*float64"):
        attrim.trace(Plain(), image(dtype=torch.float64))
    with pytest.raises(TraceError, match="takes 2 positional arguments but 3 were given"):
        attrim.trace(Plain(), (image(), image()))
    with pytest.raises(TraceError, match="unexpected keyword argument 'pixels'"):
        attrim.trace(Plain(), {"pixels": image()})


def test_a_model_that_cannot_be_copied_says_why_and_what_to_do() -> None:
    with pytest.raises(TraceError) as caught:
        attrim.trace(Locked(), image())
    assert "the model (Locked) cannot be deep-copied: TypeError: cannot pickle '_thread.lock' object" in str(
        caught.value
    )
    assert "remove locks, open files and non-leaf tensors" in str(caught.value)
    model = Remembers()
    model(image())
    with pytest.raises(TraceError, match=r"\(Remembers\) cannot be deep-copied.*detach cached activations"):
        attrim.trace(model, image())


@pytest.mark.parametrize(("result", "name"), [(3, "int"), (None, "NoneType"), ({"x": [1, "a"]}, "dict")])
def test_a_result_without_tensors_is_named(result: Any, name: str) -> None:
    with pytest.raises(TraceError, match=f"the model returned {name} without a tensor that attrim can see"):
        attrim.trace(Returns(result), image())


def test_large_but_finite_weights_are_accepted() -> None:
    model = filled(Plain())
    with torch.no_grad():
        model.conv2.weight.fill_(3e38)  # the sum overflows, the values do not
    assert [g.size for g in attrim.trace(model, image())] == [8, 12]


@pytest.mark.parametrize(
    "change", [nn.Module.bfloat16, nn.Module.double, lambda m: m.requires_grad_(False), nn.Module.train]
)
def test_other_precisions_frozen_and_training_models_are_welcome(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(filled(Plain()))
    example = image(dtype=next(model.parameters()).dtype)
    assert {g.id: g.size for g in attrim.trace(model, example)} == {"conv1": 8, "conv2": 12}
