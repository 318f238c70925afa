"""Two processes give what one gives: the same votes, the same order, the same training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import attrim
from attrim.methods.globalpru import globalpru

pytestmark = pytest.mark.slow
pytest.importorskip("accelerate")


class Unnormed(nn.Module):
    """Without batch norm, whose statistics each process measures on its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


def found(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained tensors, and orders with the agreement at the end."""
    torch.manual_seed(0)
    model = Unnormed().double()
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64), torch.arange(16) % 4) for _ in range(4)
    ]
    channels = attrim.trace(model, data[0][0][:1])
    outcome = globalpru(
        model, channels, data, ratio=0.5, warmup_epochs=2, warmup_lr=0.3, epochs=4, revote_every=2, lr=0.3, holdout=data,
        **options,
    )  # fmt: skip
    entry = outcome.statistics["epochs"][-1] if outcome.statistics["epochs"] else {}
    said = {"orders": {g: o.tolist() for g, o in outcome.statistics["orders"].items()}, "tau": entry.get("tau")}
    return dict(outcome.model_to_cut.state_dict()), said


WORKER = """
import json, os, sys
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from test_globalpru_processes import found
rank = os.environ["RANK"]
tensors, said = found(folder={folder!r} + "/run")
save_file({{k: v.detach().contiguous() for k, v in tensors.items()}}, {folder!r} + f"/{{rank}}.safetensors")
open({folder!r} + f"/{{rank}}.json", "w").write(json.dumps(said))
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    tensors, said = found()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    running = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            },
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            _, err = process.communicate(timeout=110)
            assert process.returncode == 0, err.decode()
    finally:
        for process in running:  # one that waits for another that failed
            process.kill()
    for rank in range(2):
        theirs = json.loads((tmp_path / f"{rank}.json").read_text())
        assert theirs["orders"] == said["orders"]
        for name, tensor in load_file(tmp_path / f"{rank}.safetensors").items():
            assert torch.allclose(tensor, tensors[name], atol=1e-9), name
        if rank == 0:  # who measures
            assert theirs["tau"] == pytest.approx(said["tau"])
