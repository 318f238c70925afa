"""Two processes that share every batch learn what one process learns from whole batches."""

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
from torch.utils.data import DataLoader, TensorDataset

from attrim.errors import AttrimWarning
from attrim.recover import finetune
from attrim.recover.feed import Feed
from attrim.ship import load_weights

pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(43, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > x[:, 1]).long()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six of 7 rows, which two processes cannot share evenly, and one of a single row."""
    x, y = vectors()
    return list(zip(x.split(7), y.split(7), strict=True))


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*vectors()), batch_size=7, shuffle=True)


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)).double()


def learned(kind: str, **options):
    reports: list[dict] = []
    if kind == "loader":
        source = DataLoader(TensorDataset(vectors()[0].double(), vectors()[1]), batch_size=7, shuffle=True)
    else:
        source = doubles()
    shared = {"epochs": 2, "lr": 0.3, "teacher": network(5), "holdout": doubles(), "accumulate": 2, "ema": 0.9}
    return finetune(network(), source, on_epoch=reports.append, **shared, **options), reports


def doubles():
    return [(x.double(), y) for x, y in batches()]


WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from attrim.ship import save_weights
from test_finetune_distributed import learned
rank = os.environ["RANK"]
told = {{}}
for kind in ("list", "loader"):
    tuned, told[kind] = learned(kind, folder={folder!r} + "/" + kind, clip=1.0)
    save_weights(tuned, {folder!r} + f"/{{kind}}-{{rank}}.safetensors")
open({folder!r} + f"/told-{{rank}}.json", "w").write(json.dumps(told))
torch.distributed.destroy_process_group()
"""


def launch(script: str, count: int = 2) -> list[str]:
    """What ``torchrun`` does, without its import time: one process a rank, and the environment that tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count, said
    return said


def test_two_processes_learn_what_one_learns(tmp_path):
    launch(WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert second == {"list": [], "loader": []}  # only the main process reports
    for kind in ("list", "loader"):
        whole, reports = learned(kind, clip=1.0)
        for rank in (0, 1):
            shared = network()
            load_weights(shared, tmp_path / f"{kind}-{rank}.safetensors")
            for a, b in zip(whole.state_dict().values(), shared.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        for ours, theirs in zip(reports, first[kind], strict=True):
            for name in ("loss", "loss_labels", "loss_distillation", "accuracy", "holdout_accuracy", "lr"):
                # the loader's single row is read by both processes and counts twice in the figures
                tolerance = 1e-9 if kind == "list" else 0.1
                assert theirs[name] == pytest.approx(ours[name], rel=tolerance), name
        written = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        assert written == first[kind]
        assert len(list((tmp_path / kind).glob("checkpoint-*"))) == 2


STOPPED = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_resume import Killed, Mortal, batches, network, same
from attrim.errors import AttrimWarning
from attrim.recover import finetune
from attrim.ship import load_weights, save_weights
torch.manual_seed(100 + int(os.environ["RANK"]))
folder, rank = Path({folder!r}), os.environ["RANK"]
options = dict(epochs=2, lr=0.1, accumulate=2, ema=0.9, every_minutes=1e-9)
whole = finetune(network(), batches(), folder=folder / "whole", **options)
try:
    finetune(network(), Mortal(batches(), 10), folder=folder / "killed", **options)
except Killed:
    pass
resumed = finetune(network(), batches(), folder=folder / "killed", resume=True, **options)
alone = finetune(network(), batches(), folder=folder / "other", **options)
assert same(whole, resumed) and same(whole, alone)
save_weights(resumed, folder / f"{{rank}}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_resume_bitwise_with_dropout_and_batch_norm(tmp_path):
    from test_resume import batches as pictures
    from test_resume import network as convolutional

    small = convolutional()
    launch(STOPPED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    with pytest.warns(AttrimWarning, match=r"written by 2 processes and is continued by 1: .* not bitwise the same"):
        finetune(
            small, pictures(), folder=tmp_path / "killed", resume=True, epochs=2, lr=0.1, accumulate=2, ema=0.9
        )  # finished already


def test_every_row_goes_to_one_process():
    x, _ = vectors()
    feeds = [Feed(batches(), seed=0, device=CPU, rank=rank, world=3) for rank in range(3)]
    whole: list[torch.Tensor] = []
    for portions in zip(*(feed.epoch(0) for feed in feeds), strict=True):
        sizes = [portion.size for portion in portions]
        assert sum(sizes) in (7, 1)
        rows = [p.batch.args[0] for p in portions]
        assert all(len(r) >= 1 for r in rows)  # no process is left without work
        kept = torch.empty(sum(sizes), 4)
        for rank, (portion, size) in enumerate(zip(portions, sizes, strict=True)):
            kept[rank::3] = portion.batch.args[0][:size]
            assert portion.batch.labels.tolist() == portion.batch.raw[1].tolist()
        whole.append(kept)
    assert torch.equal(torch.cat(whole), x)
    assert sizes == [1, 0, 0]


def test_a_loader_reads_only_its_share_in_the_same_order():
    alone = list(Feed(loader(), seed=1, device=CPU, rank=0, world=1).epoch(2))
    for rank in range(2):
        feed = Feed(loader(), seed=1, device=CPU, rank=rank, world=2)
        torch.manual_seed(100 + rank)  # what the processes drew before does not matter
        for one, share in zip(alone, feed.epoch(2), strict=True):
            expected = one.batch.args[0][rank::2]
            expected = expected if len(expected) else one.batch.args[0][:1]
            assert torch.equal(share.batch.args[0], expected)


def test_a_source_may_divide_itself():
    class Own(list):
        def for_process(self, rank, world):
            return [(x[rank::world][:1], y[rank::world][:1]) for x, y in self]

    portions = list(Feed(Own(batches()[:6]), seed=0, device=CPU, rank=1, world=2).epoch(0))
    assert [portion.batch.args[0].shape for portion in portions] == [(1, 4)] * 6
    assert torch.equal(portions[0].batch.args[0], batches()[0][0][1:2])


def test_without_a_launcher_there_is_one_process(monkeypatch):
    from attrim.recover.engine import make_engine, processes

    monkeypatch.setenv("WORLD_SIZE", "4")  # some batch systems set it for programs that never asked
    assert processes() == 1
    assert (make_engine(CPU, "no").world, make_engine(CPU, "no").main) == (1, True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert processes() == 4
