"""Latency: real differences show, order and modes are looked after."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from attrim.errors import InputError
from attrim.ship import compare_latency, latency


class Sleeper(nn.Module):
    def __init__(self, seconds: float, calls: list[str], name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds, self.calls, self.name = seconds, calls, name

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(f"{self.name}{'t' if self.training else 'e'}{'g' if torch.is_grad_enabled() else 'n'}")
        time.sleep(self.seconds)
        return x


def test_times_are_milliseconds_and_interleaved():
    calls: list[str] = []
    models = {"slow": Sleeper(0.012, calls, "s"), "fast": Sleeper(0.004, calls, "f")}
    models["fast"].eval()
    times = compare_latency(models, torch.zeros(1), repeats=5, warmup=1, threads=1)
    assert 12 <= times["slow"].minimum <= times["slow"].median <= times["slow"].p90 < 60
    assert 4 <= times["fast"].median < times["slow"].median
    assert times["slow"].threads == 1
    assert times["slow"].device == "cpu"
    assert times["fast"].repeats == 5
    assert set(calls) == {"sen", "fen"}  # eval mode, no gradients
    assert "".join(c[0] for c in calls[-10:]) == "sffssffssf"
    assert models["slow"].training
    assert not models["fast"].training


def test_fast_models_are_called_several_times_a_sample():
    calls: list[str] = []
    latency(Sleeper(0.0, calls, "x"), torch.zeros(1), repeats=2, warmup=1)
    assert len(calls) > 10


def test_threads_are_given_back():
    before = torch.get_num_threads()
    assert latency(nn.Linear(4, 4), torch.zeros(1, 4), repeats=1, warmup=1, threads=1).threads == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "inputs", [(torch.zeros(2, 3), torch.zeros(2, 3)), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}]
)
def test_tuples_and_dicts(inputs):
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    assert latency(Two(), inputs, repeats=1, warmup=1).median > 0


def test_bad_numbers():
    with pytest.raises(InputError, match="repeats: expected an int >= 1, found 0"):
        latency(nn.Linear(1, 1), torch.zeros(1, 1), repeats=0)
    with pytest.raises(InputError, match="expected at least one model"):
        compare_latency({}, torch.zeros(1))
