"""Sums over rows against plain ones: half of a symmetric product, tiles, views of rows, and fewer rows in some rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_refit_fit import RANDOM, found, problem, rectified_error

from attrim.recover.refit.fit import Problem, fit
from attrim.recover.refit.gather import Rows
from attrim.recover.refit.sums import Moments, Part, gram, moved


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("blocks", [1, 2])
def test_half_of_a_symmetric_product_is_all_of_it(width, blocks):
    rows = torch.randn(300, blocks, width, generator=torch.Generator().manual_seed(0))
    found = gram(rows)
    wide = rows.double()
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, wide.permute(1, 2, 0) @ wide.transpose(0, 1), rtol=1e-5, atol=1e-3)


def test_runs_of_rows_are_added_up_in_float64():
    """A sum in float32 would lose the last row."""
    rows = torch.full((8193, 1, 2), 64.0)
    rows[-1] = 1
    assert gram(rows).tolist() == [[[2**25 + 1] * 2] * 2]
    rows[:-1] = 2**13
    assert Moments.of(rows, 8).first.tolist() == [[2**26 + 1] * 2]


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_sums_in_tiles_are_those_of_all_rows_at_once(blocks, rectified):
    p = problem(rows=2500, blocks=blocks)
    part = Part(p.inputs, p.target, p.target.roll(1, 0))
    g = torch.Generator().manual_seed(5)
    change = torch.randn(blocks, 3, 6, generator=g, **RANDOM), torch.randn(3 * blocks, generator=g, **RANDOM)
    for given in (None, change):
        after = part.base if given is None else found(replace(p, base=part.base), *given)
        wanted = torch.where(p.target > 0, p.target, after.clamp_max(0)) if rectified else p.target
        rows, cross, first = part.missing(given, rectified, slice(2, 5))
        assert rows == 2500
        gap = (wanted - after).view(2500, blocks, 3)
        torch.testing.assert_close(cross, torch.einsum("rbc,rbo->bco", p.inputs[:, :, 2:5], gap))
        torch.testing.assert_close(first, gap.sum(0))
        ours, theirs = (after.clamp_min(0), p.target.clamp_min(0)) if rectified else (after, p.target)
        told = part.error(given, rectified)
        assert told == pytest.approx((float((ours - theirs).square().sum()), float(theirs.square().sum())))


@pytest.mark.parametrize("widest", [2, 8])
def test_statistics_of_outputs_are_those_of_the_rows(widest):
    p = problem(rows=2500, blocks=2)
    weight = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), **RANDOM)
    values = moved(p.inputs, weight)
    mean, square = Moments.of(p.inputs, widest).outputs(weight, p.inputs)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(square, values.square().mean(0))


def test_rows_of_a_mask_are_views_where_they_lie_together():
    p = problem(rows=20)
    part = Part(p.inputs, p.target, p.base)
    mask = torch.arange(20) >= 15
    last, first = part.of(mask), part.of(~mask)
    assert last.inputs.data_ptr() == p.inputs[15:].data_ptr()
    assert torch.equal(first.target, p.target[:15])
    apart = part.of(p.held)
    assert torch.equal(apart.inputs, p.inputs[p.held])
    assert torch.equal(apart.base, p.base[p.held])
    assert len(part.of(torch.zeros(20, dtype=torch.bool))) == 0


def test_the_order_of_the_rows_does_not_matter():
    p = problem(rows=500, rectified=True, noise=0.5)
    order = p.held.long().argsort(stable=True)
    q = Problem(p.inputs[order], p.target[order], p.base[order], p.held[order], True, True, ridges=p.ridges)
    one, other = fit(replace(p, rounds=1)), fit(replace(q, rounds=1))
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-9)
    assert one.after == pytest.approx(other.after)


def test_rounds_on_some_of_the_rows_come_as_far_as_on_all(monkeypatch):
    p = problem(rows=6000, noise=0.5, rectified=True, ridges=(1e-4,))
    p = replace(p, target=torch.where(p.target > 0, p.target, 5 * p.target - 3) - 4)
    thin, one = fit(p), fit(replace(p, rounds=1))
    monkeypatch.setattr("attrim.recover.refit.fit._MANY", 10**9)  # all rows in all rounds
    full, limit = fit(p), fit(replace(p, rounds=60))
    errors = [rectified_error(p, change) for change in (one, thin, full, limit)]
    assert errors[3] <= errors[2] < errors[0]
    assert errors[1] < errors[0]
    assert errors[1] - errors[3] < 1.2 * (errors[2] - errors[3]) + 0.01 * errors[3]


def test_rows_that_judge_are_laid_last():
    rows = Rows()
    g = torch.Generator().manual_seed(0)
    for size in (4, 3):
        rows.inputs.append(torch.randn(size, 1, 2, generator=g))
        rows.target.append(torch.randn(size, 3, generator=g))
        rows.base.append(torch.randn(size, 3, generator=g))
    rows.held = [torch.tensor([True, False, False, True]), torch.tensor([False, True, False])]
    inputs, target, base, held = rows.arranged()
    order = [1, 2, 4, 6, 0, 3, 5]
    assert held.tolist() == [False] * 4 + [True] * 3
    for ours, parts in ((inputs, rows.inputs), (target, rows.target), (base, rows.base)):
        assert torch.equal(ours, torch.cat(parts)[order])
    rows.held = [torch.ones(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
    inputs, _, _, held = rows.arranged()  # all judge: then every fifth row
    assert held.sum() == 1
    assert torch.equal(inputs, torch.cat(rows.inputs)[[0, 1, 2, 3, 5, 6, 4]])
