"""Votes: against counting by hand, the cases that Condorcet knew, streaming, draws, dead channels, processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from attrim.errors import InputError
from attrim.methods.globalpru import Votes
from attrim.methods.globalpru.vote import Ballot, pair_wins

BALLOTS = get_args(Ballot)


def scores(samples: int = 60, size: int = 9, seed: int = 0, levels: int | None = None) -> Tensor:
    """Samples that lean towards one order; with ``levels`` many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(samples, size, generator=generator) + torch.linspace(0.5, -0.5, size)
    return s if levels is None else (s * levels / 4).round()


def counted(ballot: Ballot, s: Tensor, kept: int = 4, attention: Tensor | None = None) -> Votes:
    votes = Votes(ballot, s.shape[1], kept)
    votes.add(s, attention)
    return votes


def ranks_of(s: Tensor) -> list[list[int]]:
    """Sample -> channel -> place; equal scores in the order of the index."""
    return [
        [sorted(range(len(row)), key=lambda c: (-row[c], c)).index(i) for i in range(len(row))] for row in s.tolist()
    ]


def by_hand(ballot: Ballot, s: Tensor, kept: int) -> list[int]:
    """The order by plain loops."""
    ranks, size = ranks_of(s), s.shape[1]
    total = [sum(r[c] for r in ranks) for c in range(size)]
    rows = s.tolist()
    if ballot == "pairwise":
        points = []
        for i in range(size):
            mine = 0.0
            for j in range(size):
                if i != j:
                    ahead = sum(row[i] > row[j] for row in rows) - sum(row[j] > row[i] for row in rows)
                    mine += 1.0 if ahead > 0 else 0.5 if ahead == 0 else 0.0
            points.append(mine)
    elif ballot == "topk":
        points = [float(sum(r[c] < kept for r in ranks)) for c in range(size)]
    elif ballot == "borda":
        points = [0.0] * size
    elif ballot == "mean":
        points = [sum(np.float64(row[c]) for row in rows) for c in range(size)]
    else:
        free, order = set(range(size)), []
        for k in range(size):
            best = min(free, key=lambda c: (-sum(r[c] <= k for r in ranks), total[c], c))
            free.remove(best)
            order.append(best)
        return order
    return sorted(range(size), key=lambda c: (-points[c], total[c], c))


@pytest.mark.parametrize("ballot", [b for b in BALLOTS if b != "random"])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_ballot_is_what_counting_by_hand_gives(ballot: Any, levels: int | None, seed: int) -> None:
    s = scores(seed=seed, levels=levels)
    assert counted(ballot, s).order().tolist() == by_hand(ballot, s, 4)


def test_pair_wins_counts_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scores(600, 11, levels=5)  # more samples than one byte counts
    expected = (s[:, :, None] > s[:, None, :]).sum(0)
    assert torch.equal(pair_wins(s), expected)
    assert int(expected.max()) > 255
    monkeypatch.setattr("attrim.methods.globalpru.vote._CHUNK", 2000)
    assert torch.equal(pair_wins(s), expected)


@pytest.mark.parametrize("ballot", BALLOTS)
def test_batch_by_batch_is_all_at_once(ballot: Any) -> None:
    s = scores(61, levels=6)
    whole, parts = counted(ballot, s), Votes(ballot, 9, 4)
    for part in torch.split(s, 7):
        parts.add(part)
    assert parts.samples == whole.samples == 61
    assert torch.equal(parts.ranks, whole.ranks)
    assert torch.allclose(parts.table, whole.table, rtol=1e-15)
    assert torch.equal(parts.order(), whole.order())


def test_whoever_beats_all_others_is_first_whatever_the_mean_rank() -> None:
    """Condorcet's winner: channel 0 beats both others 3 to 2, channel 1 has the better mean rank."""
    ballots = torch.tensor([[3.0, 2, 1]] * 3 + [[1.0, 3, 2]] * 2)
    assert counted("pairwise", ballots).order().tolist() == [0, 1, 2]
    assert counted("borda", ballots).order().tolist() == [1, 0, 2]


def test_a_circle_is_a_draw_which_the_mean_rank_decides_and_then_the_index() -> None:
    circle = torch.tensor([[3.0, 2, 1], [1.0, 3, 2], [2.0, 1, 3]])  # 0 > 1 > 2 > 0, each by two to one
    assert counted("pairwise", circle).order().tolist() == [0, 1, 2]
    tipped = torch.cat(
        [circle, circle, torch.tensor([[2.0, 1, 3]])]
    )  # still a circle; channel 2 has the best mean rank
    wins = counted("pairwise", tipped)
    assert bool((wins.table - wins.table.T).sign().sum(1).eq(0).all())
    assert wins.order().tolist() == [2, 0, 1]


def test_one_loud_minority_moves_the_mean_and_not_the_vote() -> None:
    """A fifth of the samples wants the reverse, ten times as strongly."""
    row = torch.linspace(1, -1, 8)
    s = torch.cat([row.expand(80, 8), -10 * row.expand(20, 8)])
    for ballot in ("pairwise", "position", "borda"):
        assert counted(ballot, s).order().tolist() == list(range(8))
    assert counted("mean", s).order().tolist() == list(range(7, -1, -1))


def test_unanimous_samples_get_their_order_from_every_ballot() -> None:
    wanted = torch.tensor([4, 0, 3, 1, 2])
    row = torch.empty(5)
    row[wanted] = torch.arange(5, 0, -1.0)
    for ballot in ("pairwise", "position", "borda", "mean"):
        assert counted(ballot, row.expand(6, 5)).order().tolist() == wanted.tolist()
    assert set(counted("topk", row.expand(6, 5), kept=2).order()[:2].tolist()) == {4, 0}


def test_scores_that_are_all_equal_leave_the_order_of_the_index() -> None:
    for ballot in ("pairwise", "position", "topk", "borda", "mean"):
        votes = counted(ballot, torch.zeros(5, 6))
        assert votes.order().tolist() == list(range(6))
        assert int(votes.spoken) == 0
    votes.add(torch.tensor([[0.0, 0, 0, 0, 0, 1], [2.0, 2, 2, 2, 2, 2]]))
    assert int(votes.spoken) == 1


def test_mean_takes_the_attention_where_there_is_one() -> None:
    s = torch.tensor([[3.0, 2, 1], [3.0, 2, 1]])
    attention = torch.tensor([[0.1, 0.9, 0.2], [0.1, 0.5, 0.2]])
    assert counted("mean", s, attention=attention).order().tolist() == [1, 2, 0]


def test_dead_channels_come_last() -> None:
    s = scores()
    for ballot in BALLOTS:
        votes = counted(ballot, s)
        plain = votes.order().tolist()
        alive = torch.ones(9, dtype=torch.bool)
        alive[plain[0]] = alive[plain[3]] = False
        dead = {plain[0], plain[3]}
        assert votes.order(alive).tolist() == [c for c in plain if c not in dead] + [c for c in plain if c in dead]


def test_a_random_order_depends_on_the_seed_alone() -> None:
    one, two, other = (Votes("random", 30, seed=s) for s in (5, 5, 6))
    one.add(scores(size=30))
    two.add(-scores(size=30))
    assert sorted(one.order().tolist()) == list(range(30))
    assert one.order().tolist() == two.order().tolist() != other.order().tolist()


@pytest.mark.parametrize("ballot", [b for b in BALLOTS if b != "random"])
def test_an_earlier_vote_weighs_half(ballot: Any) -> None:
    """Two copies of the first vote at half weight are one of it, beside the second."""
    first, second = scores(seed=1), scores(seed=2)
    mixed = counted(ballot, second)
    mixed.recall(counted(ballot, torch.cat([first, first])))
    together = counted(ballot, torch.cat([first, second]))
    assert mixed.samples == 120
    assert torch.allclose(mixed.table, together.table)
    assert torch.equal(mixed.order(), together.order())


def test_memory_does_not_grow_with_the_samples() -> None:
    sizes = {
        b: {tuple(counted(b, scores(n)).table.shape) for n in (1, 50)}
        for b in ("pairwise", "position", "topk", "borda")
    }
    assert sizes == {"pairwise": {(9, 9)}, "position": {(9, 9)}, "topk": {(9,)}, "borda": {(0,)}}


def test_an_unknown_ballot_is_named() -> None:
    with pytest.raises(
        InputError, match="vote: expected one of pairwise, position, topk, borda, mean, random, found 'stv'"
    ):
        Votes("stv", 3)  # type: ignore[arg-type]


def test_votes_add_up_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scores(61, levels=6)
    for ballot in BALLOTS:
        mine, other, whole = counted(ballot, s[:20]), counted(ballot, s[20:]), counted(ballot, s)

        def summed(ranks: Tensor, table: Tensor, samples: Tensor, spoken: Tensor, other: Votes = other) -> None:
            ranks += other.ranks
            table += other.table
            samples += other.samples
            spoken += other.spoken

        monkeypatch.setattr("attrim.methods.globalpru.vote.all_sum", summed)
        mine.sum_over_processes()
        assert mine.samples == int(mine.spoken) == 61
        assert torch.allclose(mine.table, whole.table, rtol=1e-15)
        assert torch.equal(mine.order(), whole.order())


WORKER = """
import json, os, sys
sys.path[:0] = [{here!r}]
import torch
import torch.distributed as dist
from attrim.methods.globalpru import Votes
from test_votes import BALLOTS, scores
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
s = scores(61, levels=6)
found = {{}}
for ballot in BALLOTS:
    votes = Votes(ballot, 9, 4)
    for part in list(torch.split(s, 7))[rank::2]:
        votes.add(part)
    votes.sum_over_processes()
    found[ballot] = [votes.samples, votes.order().tolist(), votes.ranks.tolist()]
open({folder!r} + f"/{{rank}}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
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
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
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
    s = scores(61, levels=6)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for ballot in BALLOTS:
            whole = counted(ballot, s)
            assert found[ballot] == [61.0, whole.order().tolist(), whole.ranks.tolist()]
