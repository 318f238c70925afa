"""Parts of ``benchmarks/search.py``: attention maps of cut layers, whether the objective foretells the accuracy, workers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import attrim
from attrim.methods.fast.objective import FastObjective
from attrim.methods.objective import NaiveObjective, best_channels
from attrim.recover import evaluate, finetune, free_recovery
from attrim.report.figures.search import kendall_tau
from attrim.search.population import random_search
from attrim.search.space import Point, Space
from attrim.search.starts import uniform
from cifar import INSIDE, first, say, untrained

BOUND = 0.65
"""Wall time of two workers, as a part of that of one."""


class Waiting:
    """An objective that leaves the processor alone, as one whose network runs on a GPU would, and computes next to nothing.

    Its value is known without any image, and uneven: some groups are worth more than others.
    """

    def __init__(self, sizes: Mapping[str, int], seconds: float) -> None:
        self.sizes, self.seconds = dict(sizes), seconds

    def __call__(self, kept: Mapping[str, int]) -> float:
        """The value of one candidate."""
        time.sleep(self.seconds)
        worth = np.random.default_rng(1).lognormal(0, 1, len(self.sizes))
        lost = np.array([1 - kept[group] / size for group, size in self.sizes.items()])
        return -float(worth @ lost**2)


def workers(options: Any) -> dict[str, Any]:
    """The same search by one process and by two, each with its trials in a journal; wall time of the whole call."""
    model, inputs = untrained(options.network).eval(), torch.randn(1, 3, 32, 32)
    channels = attrim.trace(model, inputs)
    scores = attrim.score(model, channels, "l2")
    sizes = dict(zip(channels.cost.groups, channels.cost.sizes.tolist(), strict=True))
    objective = Waiting(sizes, options.wait)

    def timed(seed: int, count: int, evaluations: int) -> tuple[float, attrim.SearchResult]:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = attrim.search(
                model,
                inputs,
                budget=attrim.Budget(macs=options.macs, frozen=INSIDE),
                criterion=scores,
                channels=channels,
                objective=objective,
                evaluations=evaluations,
                seed=seed,
                folder=folder,
                workers=count,
            )
        return time.monotonic() - begin, found

    timed(0, 1, 1)  # imports what both need
    seconds: dict[int, list[float]] = {1: [], 2: []}
    values: dict[int, list[float]] = {1: [], 2: []}
    same = True
    for seed in range(options.repeats):
        found = {}
        for count in (1, 2) if seed % 2 else (2, 1):
            spent, found[count] = timed(seed, count, options.evaluations)
            seconds[count].append(spent)
            values[count].append(found[count].value)
        same &= found[1].best == found[2].best and found[1].value == found[2].value
    ratios = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
    middle = statistics.median(ratios)
    say(
        f"  workers: two take {middle:.2f} (median; {min(ratios):.2f} .. {max(ratios):.2f}) of the wall time of one, "
        f"{statistics.median(seconds[2]):.1f} s and {statistics.median(seconds[1]):.1f} s, {options.repeats} repeats of "
        f"{options.evaluations} evaluations of {options.wait:g} s; bound {BOUND}: {'met' if middle <= BOUND else 'NOT met'}; "
        f"best candidate {'the same' if same else 'NOT the same'} ({values[1][0]:.4f} and {values[2][0]:.4f} at the first seed)"
    )
    return {"ratios": ratios, "one": seconds[1], "two": seconds[2], "same best": same, "values": [values[1], values[2]]}


def maps(bench: Any) -> dict[str, float]:
    """How far the attention maps move without some channels: ``||Q - Q'||``, mean over layers and 256 held-out images."""
    channels, images = bench.channels, [x for x, _ in first(bench.holdout, 256)]
    attention = bench.scores("arpruning", bench.calibration(bench.options.seeds[0]))
    weights = bench.scores("l1", [])
    random = torch.Generator().manual_seed(bench.options.seeds[0])
    layers = {g.id: next(t.module for t in g.taps if t.kind == "norm") for g in channels if g.id.startswith("layer")}
    moved: dict[str, list[float]] = {}
    for group, module in layers.items():
        energy = torch.cat([_energy(bench.dense, module, x.to(bench.device)) for x in images])
        order, l1 = attention.values[group].argsort(), weights.values[group].argsort()
        for words, share in (("quarter", 4), ("half", 2)):
            gone = len(order) // share
            chance = torch.randperm(len(order), generator=random)
            for name, stay in {"lowest": order[gone:], "random": chance[gone:], "highest": order[:-gone], "lowest L1": l1[gone:]}.items():  # fmt: skip
                change = _unit(energy.sum(1)) - _unit(energy[:, stay].sum(1))
                moved.setdefault(f"{words}, {name}", []).append(float(change.norm(dim=1).mean()))
    found = {name: statistics.mean(values) for name, values in moved.items()}
    say("  maps: mean change without a " + "; ".join(f"{name} {value:.3f}" for name, value in found.items()))
    both = zip(moved["half, lowest"], moved["half, random"], moved["half, highest"], strict=True)
    say(f"  maps: lowest < random < highest half in {sum(a < b < c for a, b, c in both)} of {len(layers)} layers")
    return found


@torch.no_grad()
def _energy(model: nn.Module, module: str, x: Tensor) -> Tensor:
    """Squared output of a module, shape ``(images, channels, pixels)``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, args, out: seen.append(out))
    model.eval()(x)
    handle.remove()
    return seen[0].double().square().flatten(2).cpu()


def _unit(maps: Tensor) -> Tensor:
    return maps / maps.norm(dim=1, keepdim=True).clamp_min(1e-30)


def proxy(bench: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Objectives of a search against the test accuracy of the same candidates behind the same recovery and fine-tuning.

    Uniform ratios and the first candidates of a random search. Every one is recovered as ``attrim search`` recovers its
    result (``free_recovery``), then trained for ``--tune`` epochs (2 unless given).
    """
    options = bench.options
    seed, epochs = options.seeds[0], options.tune or 2
    images = bench.calibration(seed)
    scores = bench.scores("arpruning", images)
    points = _candidates(Space.of(bench.channels, scores, bench.budget), seed, options.candidates)
    begin = time.process_time()
    values = {name: objective(points) for name, objective in _objectives(bench, scores, images).items()}
    say(f"  proxy: {len(points)} candidates valued in {time.process_time() - begin:.0f} s")
    train = bench.data.batches("train", augment=True, shuffle=True)
    accuracies = []
    for number, point in enumerate(points):
        begin = time.process_time()
        plan = bench.plan(scores, point)
        small = free_recovery(bench.dense, attrim.apply(bench.dense, plan), plan, images)
        tuned = finetune(small, train, epochs=epochs, seed=seed, teacher=bench.dense, lr=options.lr)
        accuracies.append(evaluate(tuned, bench.test))
        line = "".join(f"  {name} {100 * value[number]:.2f}" for name, value in values.items())
        what = "uniform" if not number else f"random {number}"
        say(f"  {what:<10} {time.process_time() - begin:6.0f} s{line}  fine-tuned {100 * accuracies[-1]:.2f}")
    for name, value in values.items():
        tau = kendall_tau(np.array(value), np.array(accuracies))
        say(
            f"  proxy: {name}: Kendall's tau {tau:.2f} with the accuracy after {epochs} epochs, {len(points)} candidates"
        )
    return {name: (value, accuracies) for name, value in values.items()}


def _candidates(space: Space, seed: int, count: int) -> list[Point]:
    """Uniform ratios, and so many different random ones."""
    proposals = random_search(space, uniform, seed)
    found = dict.fromkeys(next(proposals))
    for _ in range(count):
        if len(found) <= count:
            found |= dict.fromkeys(proposals.send([]))
    return list(found)[: count + 1]


def _objectives(bench: Any, scores: attrim.Scores, images: list[Any]) -> dict[str, Any]:
    """Name -> values of candidates on held-out images."""
    recalibrated = FastObjective(bench.dense, bench.channels, scores, images, bench.holdout, stop=None)
    refitted = NaiveObjective(bench.dense, bench.channels, scores, images, bench.holdout, refit=True)

    def cut(point: Point) -> float:
        plan = attrim.plan_from_kept(bench.channels, best_channels(bench.channels, scores, point))
        return evaluate(attrim.apply(bench.dense, plan), bench.holdout)

    return {
        "recalibrated": lambda points: [judged.value for judged in recalibrated.judge(points)],
        "refitted": lambda points: [refitted(point) for point in points],
        "cut only": lambda points: [cut(point) for point in points],
    }
