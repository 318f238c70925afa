"""Two processes search as one does; coarser precision."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.methods.dcpa import dcpa
from nets import Residual, filled

pytest.importorskip("accelerate")


class Unnormed(nn.Module):
    """Without batch norm, whose statistics each process measures on its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        x = x + self.three(self.two(x).relu())
        return self.head(x.relu().mean((2, 3)))


def found(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Unnormed().double()
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64), torch.arange(16) % 4) for _ in range(4)
    ]
    channels = attrim.trace(model, data[0][0][:1])
    outcome = dcpa(
        model,
        channels,
        data,
        budget=attrim.Budget(macs=0.6),
        epochs=3,
        policy_lr=0.05,
        clip=5.0,
        holdout=data,
        **options,
    )
    searched = outcome.statistics["searched"]
    theta = searched.policy.theta.detach().clone()
    with torch.no_grad():
        searched.policy.theta[:, 0] += 50  # the branch is to go, and is judged
    alone = channels.cost.macs({}, ("three",)) / channels.cost.macs()
    checks = [searched.plan(attrim.Budget(macs=alone + 0.005))[1].check for _ in range(2)]
    assert checks[0] is checks[1]
    return {
        "tensors": {
            **dict(searched.base.state_dict()),
            "theta": theta,
            "z": searched.policy.z,
            "judged": torch.tensor([row.get("loss", 0.0) for row in checks[0]["compared"]]),
        },
        "widths": dict(outcome.statistics["derived"].kept),
        "epochs": searched.reports,
    }


WORKER = """
import os, sys
sys.path[:0] = [{here!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from test_dcpa_processes import found
rank = os.environ["RANK"]
seen = found(folder={folder!r} + "/run", every_minutes=1e-9)
save_file({{k: v.detach().contiguous() for k, v in seen["tensors"].items()}}, {folder!r} + f"/{{rank}}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    script = WORKER.format(here=str(here), tests=str(here.parents[1]), folder=str(tmp_path))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    whole = found()
    for rank in range(2):
        tensors = load_file(tmp_path / f"{rank}.safetensors")
        for name, tensor in whole["tensors"].items():
            torch.testing.assert_close(tensors[name], tensor.detach(), rtol=0, atol=1e-5, msg=name)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_bf16_searches_with_weights_in_full() -> None:
    model = filled(Residual((8, 12), 1, 5))
    data = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(4)]
    channels = attrim.trace(model, data[0][0])
    outcome = dcpa(model, channels, data, budget=attrim.Budget(macs=0.5), epochs=2, precision="bf16")
    searched = outcome.statistics["searched"]
    assert all(p.dtype == torch.float32 for p in (*searched.base.parameters(), *searched.policy.parameters()))
    assert 0.49 <= outcome.plan.provenance["macs_after"] / outcome.plan.provenance["macs_before"] <= 0.5 or (
        outcome.statistics["derived"].slack > 0
    )
