"""Two processes on gloo: sums, shares, and statistics that equal those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attrim.errors import DataError
from attrim.modules.distributed import all_sum, rank, share, world
from attrim.recover import recalibrate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))


def batches() -> list[torch.Tensor]:
    """Three for the first process and two for the second, of unequal sizes and means."""
    sizes = enumerate((6, 4, 6, 6, 3))
    return [torch.randn(n, 2, 7, 7, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i, n in sizes]


def work() -> dict[str, object]:
    """What each process does and tells."""
    fresh = recalibrate(network(), list(share(batches())))
    total = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 1e-12 * rank()
    strided = total.clone().t()
    all_sum(total, strided)
    told = {
        "world": world(),
        "share": list(share("abcde")),
        "sum": total.tolist(),
        "strided": strided.tolist(),
        "state": {name: value.tolist() for name, value in fresh.state_dict().items()},
    }
    mine = [torch.randn(4, 2, 7, 7)] if rank() == 0 else [torch.full((4, 2, 7, 7), float("nan"))]
    for name, data in (("empty", []), ("broken", ["no batch"] if rank() else mine), ("nan", mine)):
        try:
            recalibrate(network(), data)
        except DataError as error:
            told[name] = str(error)
    return told


WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from test_distributed import work
told = work()
open({folder!r} + "/told-" + os.environ["RANK"] + ".json", "w").write(json.dumps(told))
dist.barrier()
dist.destroy_process_group()
"""


def launch(script: str, count: int = 2) -> None:
    """One process a rank, on the loopback and a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **shared, "RANK": str(number), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    said = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count, said


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("told")
    launch(WORKER.format(tests=str(Path(__file__).parent), folder=str(folder)))
    return [json.loads((folder / f"told-{number}.json").read_text()) for number in (0, 1)]


def test_one_process_alone():
    tensor = torch.arange(3.0)
    all_sum(tensor)
    assert (world(), rank(), tensor.tolist(), list(share("abc"))) == (1, 0, [0, 1, 2], ["a", "b", "c"])


def test_two_processes_measure_what_one_measures(told):
    first, second = told
    assert (first["world"], first["share"], second["share"]) == (2, ["a", "c", "e"], ["b", "d"])
    assert first["sum"] == second["sum"] == [[2 + 1e-12, 4 + 1e-12], [6 + 1e-12, 8 + 1e-12]]
    assert first["strided"] == [list(row) for row in zip(*first["sum"], strict=True)]
    assert first["state"] == second["state"]
    one = recalibrate(network(), batches()).state_dict()
    for name, value in first["state"].items():
        torch.testing.assert_close(torch.tensor(value), one[name], rtol=1e-6, atol=1e-7, check_dtype=False)
    assert first["state"]["1.num_batches_tracked"] == 5


def test_two_processes_fail_together(told):
    first, second = told
    assert first["broken"] == "recalibration failed in 1 of 2 processes; see the message there."
    assert second["broken"].startswith("expected a batch")
    for said in told:
        assert said["empty"].startswith("recalibration read no batch")
        assert "not finite at '1'" in said["nan"]


def test_sums_do_not_start_anything(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: pytest.fail("no process group is there"))
    all_sum(torch.zeros(1))
