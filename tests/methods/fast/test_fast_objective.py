"""Fast evaluation says what cutting, recalibrating and evaluating everything says."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attrim
from attrim.errors import AttrimWarning, DataError, InputError
from attrim.methods.fast.objective import FastObjective
from attrim.methods.fast.stops import Stop
from attrim.modules.batches import Batch, read_batch
from attrim.recover import evaluate, recalibrate
from attrim.search.decide import plan_from_kept
from nets import Mobile, Plain, Residual, filled, random_scores

SHAPE = (3, 16, 16)


def data(batches: int, seed: int, size: int = 16, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *SHAPE, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(batches)
    ]


class Case:
    """A network, scores, and both kinds of images."""

    def __init__(self, make: type[nn.Module], classes: int = 10) -> None:
        self.model = filled(make())
        self.channels = attrim.trace(self.model, torch.randn(1, *SHAPE))
        self.scores = random_scores(self.channels)
        self.calibration, self.holdout = data(3, 0), data(4, 1, classes=classes)

    def fast(self, **options: Any) -> FastObjective:
        return FastObjective(self.model, self.channels, self.scores, self.calibration, self.holdout, **options)

    def plainly(self, point: tuple[int, ...]) -> float:
        kept = {}
        for group, count in zip(self.channels.cost.groups, point, strict=True):
            order = self.scores.values[group].argsort(descending=True, stable=True)
            kept[group] = sorted(order[:count].tolist())
        small = attrim.apply(self.model, plan_from_kept(self.channels, kept))
        if any(isinstance(m, nn.BatchNorm2d) for m in small.modules()):
            small = recalibrate(small, self.calibration, limit=None)
        return evaluate(small, self.holdout)

    def points(self, count: int, seed: int = 0, changed: int = 2) -> list[tuple[int, ...]]:
        """One, and others that differ from it in a few groups."""
        rng = np.random.default_rng(seed)
        sizes = self.channels.cost.sizes
        base = np.maximum(1, sizes * 3 // 4)
        found = [tuple(base.tolist())]
        while len(found) < count:
            other = base.copy()
            for g in rng.choice(len(sizes), min(changed, len(sizes)), replace=False):
                other[g] = rng.integers(1, sizes[g] + 1)
            found.append(tuple(other.tolist()))
        return found


@pytest.mark.parametrize("make", [Residual, Mobile, Plain])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_every_candidate_scores_what_it_scores_plainly(make: type[nn.Module], memory: int) -> None:
    case = Case(make, classes=5 if make is Plain else 10)
    points = case.points(7)
    objective = case.fast(stop=None, memory=memory)
    found = [objective(points[0]), *(judged.value for judged in objective.judge(points[1:]))]
    assert found == pytest.approx([case.plainly(p) for p in points], abs=1e-12)
    assert (objective.work < len(points)) == (memory > 0)


def test_the_reference_follows_the_search() -> None:
    case = Case(Residual)
    objective = case.fast(stop=None)
    far = tuple(np.maximum(1, case.channels.cost.sizes // 3).tolist())
    last = len(far) - 1
    near = [(*far[:last], k) for k in range(1, 9)]
    objective(case.points(1)[0])
    objective(far)
    before = objective.work
    found = objective.judge(near)
    assert objective.work - before < 0.5 * len(near)
    assert [j.value for j in found] == pytest.approx([case.plainly(p) for p in near], abs=1e-12)
    for batch in range(3):  # further references, each built from the one before, and candidates of all depths
        base = list(near[batch + 2])
        base[last - 1 - batch] += 1
        points = [tuple(base)]
        points += [tuple(n - (i == g) for i, n in enumerate(base)) for g in range(len(base))]
        found = objective.judge(points)
        assert [j.value for j in found] == pytest.approx([case.plainly(p) for p in points], abs=1e-12)


def test_candidates_that_come_one_by_one_find_a_reference_too() -> None:
    case = Case(Residual)
    objective = case.fast(stop=None)
    points = [(*case.points(1)[0][:-1], k) for k in range(1, 17)]
    values = [objective(p) for p in points]
    assert objective.work < 0.8 * len(points)
    assert values == pytest.approx([case.plainly(p) for p in points], abs=1e-12)


@pytest.mark.parametrize("make", [Residual, Mobile])
@pytest.mark.parametrize("stop", [None, Stop()])
def test_what_neighbours_share_behind_the_reference_runs_once(make: type[nn.Module], stop: Stop | None) -> None:
    """Three families, of which one holds its own trunk and one changes the first group of all; two are alone."""
    case = Case(make)
    base = list(case.points(1)[0])
    last = len(base) - 1

    def changed(*changes: tuple[int, int]) -> tuple[int, ...]:
        other = base.copy()
        for group, by in changes:
            other[group] -= by
        return tuple(other)

    batch = [
        changed((0, 2)),
        changed((0, 2), (1, 1)),
        changed((0, 2), (last, 2)),
        changed((0, 2), (last, 3), (1, 2)),
        changed((0, 1), (last, 1)),
        changed((1, 3), (last, 1)),
        changed((1, 3), (last, 2)),
        changed((1, 3), (last - 1, 2)),
        changed((2, 3), (last, 2)),
    ]
    objective = case.fast(stop=stop)
    objective(tuple(base))
    order = objective.expect(batch)
    assert sorted(order) == sorted(batch)
    places = [order.index(point) for point in batch[:4]]
    assert max(places) - min(places) == 3  # one after the other
    for _ in range(2):  # the best of the batch is the next reference, filled through a trunk
        before = objective.work
        found = objective.judge(batch)
        spent = objective.work - before
        exact = [case.plainly(p) for p in batch]
        assert [j.value for j in found if j.complete] == pytest.approx(
            [e for e, j in zip(exact, found, strict=True) if j.complete], abs=1e-12
        )
        if stop is None:
            assert all(j.complete for j in found)
            layout = objective._origins.layout
            alone = sum(1 - layout.saved(layout.depth(tuple(base), p)) for p in batch)
            assert spent < 0.85 * (alone if objective._origins._reference else len(batch))
        best = objective.best
        assert best is not None
        base = list(best[0])
        batch = [changed((1, 1)), changed((1, 1), (last, 1)), changed((1, 1), (last - 1, 1)), changed((last, 1))]
    assert all(not module._forward_hooks for module in case.model.modules())


def test_memory_bounds_what_is_kept() -> None:
    case = Case(Residual)
    images = sum(len(x) for x, _ in (*case.calibration, *case.holdout))
    all_of_it = case.fast(stop=None)._origins.layout.nbytes * images
    less = case.fast(stop=None, memory=all_of_it)
    assert 0 < less._origins.layout.nbytes * images <= all_of_it // 4  # one of four


def test_the_best_is_the_best_although_others_are_given_up() -> None:
    case = Case(Residual)
    teacher = recalibrate(case.model, case.calibration, limit=None)
    with torch.no_grad():
        middle = torch.cat([teacher(x) for x, _ in case.calibration]).mean(0)
        for network in (case.model, teacher):
            network.fc.bias -= middle  # all classes occur
        case.holdout = [(x, teacher(x).argmax(1)) for x, _ in data(8, 5)]  # the whole network is always right
    points = case.points(24, changed=4)
    whole = tuple(case.channels.cost.sizes.tolist())
    objective = case.fast(stop=Stop(z=3.0))
    objective(points[0])
    found = [objective(whole), *(j.value for j in objective.judge(points[1:]))]
    exact = [case.plainly(p) for p in (whole, *points[1:])]
    assert objective.best == (whole, pytest.approx(exact[0]))
    given_up = [not objective.judge([p])[0].complete for p in points[1:]]
    assert sum(given_up) > 10
    assert all(value < found[0] for value, up in zip(found[1:], given_up, strict=True) if up)
    assert max(exact[1:]) <= exact[0]
    kept_whole = [v == pytest.approx(e) for v, e, up in zip(found[1:], exact[1:], given_up, strict=True) if not up]
    assert all(kept_whole)


def test_the_same_calls_give_the_same_values() -> None:
    case = Case(Residual)
    points = case.points(14, changed=3)
    first, second = case.fast(), case.fast()
    values = [j.value for j in first.judge(points)]
    assert [j.value for j in second.judge(points)] == values


def test_a_run_that_goes_on_judges_as_the_unbroken_one() -> None:
    case = Case(Residual)
    batches = [case.points(5, seed, changed=3) for seed in range(4)]
    unbroken = case.fast()
    found = [dict(zip(batch, unbroken.judge(batch), strict=True)) for batch in batches]
    again = case.fast()
    for results in found[:2]:
        again.learn(results)
    assert again.work == 0.0  # nothing is run before it is needed
    for batch, results in zip(batches[2:], found[2:], strict=True):
        assert dict(zip(batch, again.judge(batch), strict=True)) == results
    assert again.best == unbroken.best


def test_a_candidate_that_may_not_win_is_no_yardstick() -> None:
    case = Case(Residual)
    objective = case.fast()
    points = case.points(3)
    whole = tuple(case.channels.cost.sizes.tolist())
    first = objective.judge_one(whole, exact=True)
    objective.learn({whole: first}, eligible=lambda point: point != whole)
    assert first.complete
    assert objective.best is None
    second = objective.judge_one(points[0])
    objective.learn({points[0]: second})
    assert second.complete
    assert objective.best == (points[0], second.value)
    assert objective.judge_one(points[1], exact=True).complete


def test_the_dense_network_is_left_alone() -> None:
    case = Case(Mobile)
    before = copy.deepcopy(case.model.state_dict())
    case.model.train()
    case.fast().judge(case.points(4))
    assert case.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert all(not module._forward_hooks for module in case.model.modules())


def test_networks_without_batch_norm_and_dict_batches() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
            self.head = nn.Linear(16, 10)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.head(self.b(self.a(pixels).relu()).relu().mean((2, 3)))

    case = Case(Bare)
    case.calibration = [{"pixels": x} for x, _ in case.calibration]  # type: ignore[misc]
    case.holdout = [{"pixels": x, "labels": y} for x, y in case.holdout]  # type: ignore[misc]
    points = case.points(6, changed=1)
    objective = case.fast(stop=None)
    assert [j.value for j in objective.judge(points)] == pytest.approx([case.plainly(p) for p in points])


def test_own_values_take_the_place_of_top1() -> None:
    case = Case(Residual)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return -torch.nn.functional.cross_entropy(outputs, batch.labels, reduction="none")

    objective = case.fast(values=loss, stop=None)
    kept = tuple(case.channels.cost.sizes.tolist())
    small = recalibrate(case.model, case.calibration, limit=None)
    expected = torch.cat([loss(small(x), read_batch((x, y), torch.device("cpu"))) for x, y in case.holdout]).mean()
    assert objective(kept) == pytest.approx(expected.item(), rel=1e-5)


class Careless(nn.Module):
    """Throws away what an in-place activation returns, in a way that cannot be taken up behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.relu(y)
        return self.c(self.b(y).relu().mean((2, 3)))


def test_a_place_that_gives_something_else_is_left_out_loudly() -> None:
    case = Case(Careless)
    points = [(*case.points(1)[0][:-1], k) for k in range(1, 9)]
    objective = case.fast(stop=None)
    objective(points[0])
    with pytest.warns(AttrimWarning, match="evaluated right, but slower"):
        found = objective.judge(points[1:])
    assert [j.value for j in found] == pytest.approx([case.plainly(p) for p in points[1:]])


def test_wrong_arguments() -> None:
    case = Case(Plain, classes=5)
    with pytest.raises(DataError, match="holdout: no batch"):
        FastObjective(case.model, case.channels, case.scores, case.calibration, [])
    with pytest.raises(InputError, match="keeping 99 is impossible"):
        case.fast()({"conv1": 99})
    with pytest.raises(DataError, match="labels"):
        FastObjective(case.model, case.channels, case.scores, case.calibration, [x for x, _ in case.holdout])((8, 12))
    with pytest.raises(InputError, match="expected z > 0"):
        Stop(z=0.0)
    del case.scores.values["conv1"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="'conv1' has no scores"):
        case.fast()({"conv1": 3})


def test_the_best_of_a_batch_becomes_the_reference_without_another_run() -> None:
    case = Case(Residual)
    objective = case.fast(stop=None)
    objective(case.points(1)[0])
    first = case.points(9, seed=1)[1:]
    found = objective.judge(first)
    best = first[int(np.argmax([j.value for j in found]))]
    assert objective.best is not None
    if objective.best[0] != best:
        pytest.skip("the first candidate is the best one")
    last = len(best) - 1
    near = [(*best[:last], k) for k in range(1, 9) if k != best[last]]
    before = objective.work
    found = objective.judge(near)
    own = 1 - objective._origins.layout.saved(objective._origins.layout.depth(best, near[0]))
    assert objective.work - before == pytest.approx(own * len(near))  # and nothing for the reference
    assert [j.value for j in found] == pytest.approx([case.plainly(p) for p in near], abs=1e-12)
