"""The fit against plain solvers; what it does with ridges, blocks of columns, the ReLU, and rows in several processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attrim.modules.course.survey import Unit
from attrim.recover.refit.fit import Problem, fit
from attrim.recover.refit.gather import Sampling
from attrim.recover.refit.sums import Moments

RANDOM = {"dtype": torch.float64}


def problem(
    rows: int = 400, width: int = 6, outputs: int = 3, blocks: int = 1, *, noise: float = 0.3, seed: int = 0, **options
) -> Problem:
    """Correlated inputs with a mean, targets that are nearly linear, and outputs of nothing so far."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(blocks, width, width, generator=g, **RANDOM)
    inputs = (torch.randn(rows, blocks, width, generator=g, **RANDOM).transpose(0, 1) @ mix).transpose(0, 1) + 1
    truth = torch.randn(blocks, outputs, width, generator=g, **RANDOM)
    target = (inputs.transpose(0, 1) @ truth.mT).transpose(0, 1).flatten(1) + 2
    target = target + noise * torch.randn(target.shape, generator=g, **RANDOM)
    held = torch.arange(rows) % 5 == 4
    given = {"centred": True, "rectified": False, "ridges": (1e-13,)}
    return Problem(inputs, target, torch.zeros_like(target), held, **{**given, **options})


def found(p: Problem, weight: Tensor, bias: Tensor) -> Tensor:
    """Outputs after a change, written out block by block."""
    blocks = [p.inputs[:, b] @ weight[b].T for b in range(p.inputs.shape[1])]
    return p.base + torch.cat(blocks, 1) + bias


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
def test_without_a_ridge_it_is_least_squares_on_all_rows(blocks, centred):
    p = problem(blocks=blocks, centred=centred)
    change = fit(p)
    for b in range(blocks):
        rows = p.inputs[:, b]
        if centred:
            rows = torch.cat([rows, torch.ones(len(rows), 1, **RANDOM)], 1)
        solution = torch.linalg.lstsq(rows, p.target[:, 3 * b : 3 * b + 3]).solution
        torch.testing.assert_close(change.weight[b], solution[:6].T, rtol=0, atol=1e-8)
        if centred:
            torch.testing.assert_close(change.bias[3 * b : 3 * b + 3], solution[6], rtol=0, atol=1e-8)
    if not centred:
        assert not change.bias.any()


def test_the_ridge_pulls_towards_no_change():
    p = problem(ridges=(0.5,))
    centre = p.inputs[:, 0] - p.inputs[:, 0].mean(0)
    gram = centre.T @ centre / len(centre)
    cross = centre.T @ (p.target - p.target.mean(0)) / len(centre)
    level = 0.5 * gram.diagonal().mean()
    expected = torch.linalg.solve(gram + level * torch.eye(6, **RANDOM), cross)
    change = fit(p)
    assert change.ridge == 0.5
    torch.testing.assert_close(change.weight[0], expected.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(found(p, change.weight, change.bias).mean(0), p.target.mean(0), rtol=0, atol=1e-10)


def test_the_ridge_is_chosen_on_rows_that_took_no_part():
    """Few rows, many unknowns, much noise: a strong ridge. Many rows, little noise: the weakest."""
    noisy = problem(rows=60, width=40, noise=20.0, ridges=(1e-6, 1e-4, 1e-2, 1.0))
    clean = problem(rows=4000, width=40, noise=0.01, ridges=(1e-6, 1e-4, 1e-2, 1.0))
    assert fit(clean).ridge == 1e-6
    assert (change := fit(noisy)) is None or change.ridge >= 1e-2


def test_nothing_changes_if_nothing_is_better():
    p = problem(noise=0)
    assert fit(replace(p, base=p.target)) is None
    random = torch.randn(p.target.shape, generator=torch.Generator().manual_seed(1), **RANDOM)
    pure = replace(problem(rows=45, width=30), base=torch.zeros(45, 3, **RANDOM), target=random[:45] * 1.0)
    assert fit(pure) is None or fit(pure).after < fit(pure).before
    assert fit(replace(p, held=torch.ones(len(p.held), dtype=torch.bool))) is None


def test_the_told_errors_are_those_of_the_held_rows():
    p = problem(noise=1.0)
    change = fit(p)
    seen = replace(p, inputs=p.inputs[~p.held], target=p.target[~p.held], base=p.base[~p.held], held=p.held[~p.held])
    rows = torch.cat([seen.inputs[:, 0], torch.ones(len(seen.inputs), 1, **RANDOM)], 1)
    solution = torch.linalg.lstsq(rows, seen.target).solution
    judged = torch.cat([p.inputs[p.held][:, 0], torch.ones(int(p.held.sum()), 1, **RANDOM)], 1)
    size = p.target[p.held].square().sum()
    assert change.before == pytest.approx(1.0)
    assert change.after == pytest.approx(float((judged @ solution - p.target[p.held]).square().sum() / size), rel=1e-6)


def test_a_singular_system_is_left_alone_without_a_ridge_and_solved_with_one():
    p = problem(noise=0)
    twice = replace(p, inputs=torch.cat([p.inputs, p.inputs, torch.zeros_like(p.inputs)], 2))
    change = fit(replace(twice, ridges=(0.0, 1e-12)))
    if change is not None:
        assert found(twice, change.weight, change.bias).isfinite().all()
    change = fit(replace(twice, ridges=(1e-9,)))
    assert (found(twice, change.weight, change.bias) - p.target).abs().max() < 1e-4
    dead = replace(p, inputs=torch.zeros_like(p.inputs))
    change = fit(replace(dead, ridges=(1e-3,)))
    torch.testing.assert_close(change.bias, p.target.mean(0), rtol=0, atol=1e-9)
    assert not change.weight.any()


def rectified_error(p: Problem, change) -> float:
    return float((found(p, change.weight, change.bias).clamp_min(0) - p.target.clamp_min(0)).square().mean())


@pytest.mark.parametrize("seed", range(4))
def test_rectified_targets_lower_the_error_behind_the_relu(seed):
    p = problem(rows=2000, noise=0, seed=seed)
    bent = torch.where(p.target > 0, p.target, 5 * p.target - 3)  # no linear function below zero
    p = replace(p, target=bent - 4, base=torch.zeros_like(bent))
    plain, rectified = (fit(replace(p, rectified=flag)) for flag in (False, True))
    assert rectified_error(p, rectified) < 0.9 * rectified_error(p, plain)


def test_a_rectified_problem_that_can_be_met_everywhere_is_met():
    p = problem(noise=0, rectified=True)
    p = replace(p, target=p.target - 3)
    assert rectified_error(p, fit(p)) < 1e-12


@pytest.mark.parametrize("widest", [5, 12])
def test_blocks_of_columns_come_close_to_the_whole(widest):
    p = problem(rows=2000, width=24, noise=0.5, ridges=(1e-3, 1e-2, 1e-1, 1.0))
    mixed = replace(p, inputs=p.inputs + 3 * torch.randn(p.inputs.shape, generator=torch.Generator().manual_seed(3)))
    whole, parts = fit(mixed), fit(replace(mixed, widest=widest))
    assert parts.weight.shape == whole.weight.shape
    assert whole.after <= parts.after < 0.5
    assert parts.after - whole.after < 0.1


def test_blocks_that_do_not_share_information_are_solved_exactly():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 8, generator=g, **RANDOM) - 0).Q * 20
    p = replace(problem(width=8, centred=False), inputs=basis[:, None], target=basis[:, :3] + basis[:, 5:])
    whole, parts = fit(p), fit(replace(p, widest=4))
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=0.05 * float(whole.weight.abs().max()))


SOUGHT = [(400, 0.3, 1e-4), (90, 2.0, 1e-3), (90, 4.0, 1e-2), (90, 20.0, 1e-1), (60, 60.0, 1.0)]


@pytest.mark.parametrize(("rows", "noise", "best"), SOUGHT)
def test_the_ridge_is_found_from_the_middle_wherever_it_is(rows, noise, best):
    """What each of five ridges alone tells on the held rows, and what the choice among all of them tells."""
    p = problem(rows=rows, width=40, noise=noise)
    ridges = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    alone = {ridge: change.after for ridge in ridges if (change := fit(replace(p, ridges=(ridge,)))) is not None}
    chosen = fit(replace(p, ridges=ridges))
    assert chosen.ridge == min(alone, key=alone.get) == best
    assert chosen.after == alone[chosen.ridge]


def unit(**options) -> Unit:
    given = {"key": ("w", 0), "offset": 0, "dim": 1, "steps": 0, "join": False, "rectified": False, "flipped": False}
    sizes = {"outputs": 64, "block_outputs": 64, "columns": 576, "places": 32 * 64, "bias": True, "norm": -1}
    return Unit(**{**given, **sizes, **options})


@pytest.mark.parametrize("memory", [0, 1 << 30, 8 << 30])
@pytest.mark.parametrize("columns", [27, 576, 4608, 25088])
def test_the_rows_of_a_unit_fit_into_the_memory_that_was_promised(memory, columns):
    sampling = Sampling((64,) * 500, 0, memory)
    u = unit(columns=columns, places=64 * 56 * 56)
    rows = sampling.rows(u, 64)
    taken = 4 * rows * (columns + 2 * u.outputs)
    assert 64 <= rows <= 64 * 500 * 56 * 56
    assert taken <= max(memory, 1 << 29) / 2 or rows == 64
    assert rows >= min(64 * 500 * 56 * 56, 16384) or taken > (1 << 28) / 5  # no fewer than that needs


def test_positions_are_shared_out_over_the_batches_and_the_same_again():
    sampling = Sampling((8, 8, 4), 3, 1 << 30)
    at = [sampling.at(5, i, 100, n * 64) for i, n in enumerate((8, 8, 4))]
    assert [len(a) for a in at] == [40, 40, 20]
    assert all(
        torch.equal(a, sampling.at(5, i, 100, n * 64)) for i, (a, n) in enumerate(zip(at, (8, 8, 4), strict=True))
    )
    assert not torch.equal(at[0], at[1])
    assert not torch.equal(at[0], sampling.at(6, 0, 100, 8 * 64))
    assert sampling.at(0, 0, 10**6, 512).tolist() == list(range(512))  # all there are


# several processes

WORKER = """
import json, os, sys
sys.path[:0] = [{tests!r}, {room!r}]
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
import test_refit_fit as here
rank = dist.get_rank()
told = here.everything(rank, 2)
open({folder!r} + f"/told-{{rank}}.json", "w").write(json.dumps(told))
dist.destroy_process_group()
"""


def everything(rank: int = 0, world: int = 1) -> dict[str, list[float]]:
    """Fits, sums, folded means and a reconstruction, from this process's share of the data."""

    from chains import calibrated, pictures

    import attrim
    from attrim.recover import fold_bias, reconstruct
    from nets import Residual, kept_at_random

    def share(p: Problem) -> Problem:
        part = slice(rank, None, world)
        return replace(p, inputs=p.inputs[part], target=p.target[part], base=p.base[part], held=p.held[part])

    told = {}
    for name, p in (
        ("plain", problem(noise=1.0)),
        ("rectified", problem(rectified=True)),
        ("blocks", problem(widest=2)),
    ):
        change = fit(share(p))
        told[name] = [*change.weight.flatten().tolist(), *change.bias.tolist(), change.before, change.after]
    p = share(problem(blocks=2))
    moments = Moments.of(p.inputs, p.widest)
    told["sums"] = [moments.rows, *moments.first.flatten().tolist(), *moments.grams[0].flatten().tolist()]
    net = calibrated(Residual(widths=(8, 12), blocks=1)).double()
    data = [pictures(5, i, 12).double() for i in range(4)]  # batches of five: every fifth sample judges, whoever counts
    plan = kept_at_random(attrim.trace(net, data[0]), seed=1, least=6)
    small = attrim.apply(net, plan)
    mine = data[rank::world]
    for name, ours in (
        ("folded", fold_bias(net, small, plan, mine)),
        ("fitted", reconstruct(net, small, plan, mine, ridges=(1e-3,), rectify=False)),
    ):
        told[name] = [float(t.double().sum()) for t in ours.state_dict().values()]
        told[name] += [float(t.double().square().sum()) for t in ours.state_dict().values()]
    return told


@pytest.mark.slow
def test_two_processes_fit_what_one_fits(tmp_path):
    """Which positions are looked at depends on the number of a batch in its process, so that equality holds where all
    positions are looked at, and where the samples that judge are the same."""
    from test_finetune_distributed import launch

    room = Path(__file__).parent
    launch(WORKER.format(tests=str(room.parent), room=str(room), folder=str(tmp_path)))
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    whole = everything()
    for name, values in whole.items():
        # half-converged fits of a network amplify the order of summation a little
        tolerance = 1e-6 if name == "fitted" else 1e-9
        torch.testing.assert_close(
            torch.tensor(first[name], **RANDOM),
            torch.tensor(values, **RANDOM),
            rtol=tolerance,
            atol=tolerance,
            msg=name,
        )
