"""The ratio search: how fast candidates are evaluated, what it finds, and what is left of the gain after recovery.

    python benchmarks/search.py --data DATA --checkpoints DIR                       # ResNet-56, about 40 minutes on two cores
    python benchmarks/search.py --data DATA --checkpoints DIR --parts speed
    python benchmarks/search.py --data DATA --checkpoints DIR --full --json FILE    # for a GPU

DATA is a data source as ``attrim prune --data`` takes it (CIFAR-10); DIR holds NETWORK-cifar10-jpeg.safetensors. Half of the
multiply-adds, only channels inside the blocks; channels within a layer by ``arpruning``.

``speed``: the candidates of a neighbourhood search, evaluated by ``FastObjective`` and one by one the plain way (copy, cut,
recalibrate, evaluate everything); processor time, the same images for both.
``compare``: uniform ratios, random search and neighbourhood search at equal numbers of evaluations; the value on held-out
training images, and the test accuracy of what was found: recalibrated, and after the same recovery.
``two``: {arpruning, l1} x {search, uniform}.
``maps``: how far a layer's attention map moves without its lowest, highest and random channels.
``proxy``: random candidates by three objectives, and by their test accuracy after the same fine-tuning; Kendall's tau.
``workers``: the same search by one process and by two, with an objective that waits as for a GPU; needs no data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import attrim
from attrim.methods.fast.objective import FastObjective
from attrim.recover import evaluate, finetune, free_recovery, recalibrate
from attrim.search.protocol import Evaluate, Found, optimise
from attrim.search.ratio import SEARCHES, start_of
from attrim.search.space import Point, Space
from cifar import INSIDE, Pair, first, open_cifar, say, trained
from search_parts import maps, proxy, workers


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", attrim.AttrimWarning)
    say(f"attrim {attrim.__version__}, torch {torch.__version__}, {options.threads} thread(s), {options.network}")
    bench = Bench(options) if set(options.parts) != {"workers"} else None
    found: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("data", "checkpoints")}
    }
    for part in options.parts:
        found[part] = workers(options) if bench is None or part == "workers" else PARTS[part](bench)
        written(options, found)


def written(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Put what was measured into the file that was asked for."""
    if options.json:
        Path(options.json).write_text(json.dumps(found) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 as attrim prune --data takes it")
    parser.add_argument("--checkpoints", type=Path, help="folder with NETWORK-cifar10-jpeg.safetensors")
    parser.add_argument("--network", default="resnet56", choices=["resnet20", "resnet56"])
    parser.add_argument(
        "--parts", nargs="+", choices=[*PARTS, "workers"], help="default: speed compare; with --full two"
    )
    parser.add_argument("--searches", nargs="+", default=["random", "neighbourhood"], choices=list(SEARCHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=80, help="of each search (default 80)")
    parser.add_argument("--macs", type=float, default=0.5, help="share that is kept (default 0.5)")
    parser.add_argument("--calibration", type=int, default=1024, help="augmented images (default 1024)")
    parser.add_argument("--holdout", type=int, default=2000, help="held-out training images (default 2000)")
    parser.add_argument("--rows", type=int, default=5000, help="training rows (default 5000)")
    parser.add_argument("--tune", type=int, default=0, help="epochs of fine-tuning what was found (default 0; proxy 2)")
    parser.add_argument("--lr", type=float, default=0.03, help="of the fine-tuning (default 0.03)")
    parser.add_argument("--candidates", type=int, default=12, help="of proxy, beside uniform ratios (default 12)")
    parser.add_argument("--repeats", type=int, default=3, help="of workers (default 3)")
    parser.add_argument(
        "--wait", type=float, default=0.4, help="seconds that one evaluation of workers takes (default 0.4)"
    )
    parser.add_argument("--test-images", type=int, default=5000, help="a prefix of the test split (default 5000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="300 evaluations, all rows, all test images, fine-tuning")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if options.full:
        options.evaluations, options.rows, options.test_images, options.tune = 300, 45_000, 10_000, 40
        options.holdout = 5000
    options.parts = options.parts or ["speed", "compare", *(["two"] if options.full else [])]
    if set(options.parts) != {"workers"} and not (options.data and options.checkpoints):
        parser.error("--data and --checkpoints are needed for all parts but workers")
    return options


class Bench:
    """The network, its data, and the space."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.dense = trained(options.network, options.checkpoints).to(self.device)
        self.data = open_cifar(options.data, max(options.rows, options.holdout))
        self.test = list(first(self.data.batches("test"), options.test_images))
        self.channels = attrim.trace(self.dense, torch.randn(1, 3, 32, 32, device=self.device))
        self.budget = attrim.Budget(macs=options.macs, frozen=INSIDE)
        self.holdout = list(first(self.data.batches("holdout"), options.holdout))
        say(f"dense {evaluate(self.dense, self.test):.2%} on {options.test_images} test images")

    def calibration(self, seed: int) -> list[Pair]:
        """Augmented training images."""
        batches = self.data.batches("train", augment=True, shuffle=True)
        batches.set_epoch(1000 + seed)
        return list(first(batches, self.options.calibration))

    def scores(self, criterion: str, images: list[Pair]) -> attrim.Scores:
        """Of one criterion, for the order inside each group."""
        needed = images if criterion == "arpruning" else None
        return attrim.score(self.dense, self.channels, criterion, needed)

    def plan(self, scores: attrim.Scores, point: Point) -> attrim.PruningPlan:
        """The cut with these kept counts."""
        kept = {}
        for group, count, size in zip(self.channels.cost.groups, point, self.channels.cost.sizes.tolist(), strict=True):
            if count < size:
                kept[group] = scores.values[group].argsort(descending=True, stable=True)[:count].tolist()
        return attrim.plan_from_kept(self.channels, kept)

    def speed(self) -> dict[str, Any]:
        """Throughput of both ways on the candidates of one search."""
        images = self.calibration(0)
        scores = self.scores("arpruning", images)
        space = Space.of(self.channels, scores, self.budget)
        found: dict[str, Any] = {}
        for name, options in (("with stops", {}), ("without stops", {"stop": None})):
            batches: list[list[Point]] = []
            objective = FastObjective(self.dense, self.channels, scores, images, self.holdout, **options)
            begin = time.process_time()
            run = search(self, "neighbourhood", objective, space, scores, 0, batches)
            seconds = time.process_time() - begin
            found[name] = {
                "seconds": seconds,
                "candidates": len(run.trials),
                "work": objective.work,
                "complete": sum(objective.judge([t.kept])[0].complete for t in run.trials),
            }
            if name == "without stops":
                sample = run.trials[:: max(1, len(run.trials) // 20)]
                begin = time.process_time()
                plain = [self.plainly(scores, trial.kept, images) for trial in sample]
                each = (time.process_time() - begin) / len(sample)
                differences = [abs(a - trial.value) for a, trial in zip(plain, sample, strict=True)]
                found["plain seconds each"], found["largest difference"] = each, max(differences)
        for name in ("without stops", "with stops"):
            part = found[name]
            part["times as fast"] = found["plain seconds each"] * part["candidates"] / part["seconds"]
            say(
                f"  {name}: {part['candidates']} candidates, {part['complete']} judged whole, "
                f"{part['seconds'] / part['candidates']:.2f} s each against {found['plain seconds each']:.2f} s the plain way: "
                f"{part['times as fast']:.1f}x"
            )
        say(f"  largest difference of a candidate's top-1 between the two ways: {found['largest difference']:.5f}")
        return found

    def plainly(self, scores: attrim.Scores, point: Point, images: list[Pair]) -> float:
        """Copy, cut, recalibrate, evaluate everything."""
        small = attrim.apply(self.dense, self.plan(scores, point))
        return evaluate(recalibrate(small, images, limit=None), self.holdout)

    def compare(self) -> dict[str, Any]:
        """Searches against uniform ratios, on held-out and on test images."""
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in self.options.seeds:
            images = self.calibration(seed)
            scores = self.scores("arpruning", images)
            for name in ("uniform", *self.options.searches):
                found.setdefault(name, []).append(self.searched(name, scores, images, seed))
            self.so_far(found)
        report(self.options.network, found)
        return {"runs": found, "groups": list(self.channels.cost.groups), "sizes": self.channels.cost.sizes.tolist()}

    def two(self) -> dict[str, Any]:
        """Criterion and search, each with and without."""
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in self.options.seeds:
            images = self.calibration(seed)
            for criterion in ("arpruning", "l1"):
                scores = self.scores(criterion, images)
                for name in ("uniform", "neighbourhood"):
                    run = self.searched(name, scores, images, seed)
                    found.setdefault(f"{criterion}, {name}", []).append(run)
            self.so_far(found)
        report(self.options.network, found)
        return {"runs": found}

    def so_far(self, found: Mapping[str, Any]) -> None:
        """The seeds that are done, beside the final file: a run of an hour may be killed."""
        if self.options.json:
            Path(f"{self.options.json}.part").write_text(json.dumps(found) + "\n", encoding="utf-8")

    def searched(self, name: str, scores: attrim.Scores, images: list[Pair], seed: int) -> dict[str, Any]:
        """One search and what its result is worth."""
        space = Space.of(self.channels, scores, self.budget)
        objective = FastObjective(self.dense, self.channels, scores, images, self.holdout)
        begin = time.process_time()
        run = search(self, name, objective, space, scores, seed, [])
        seconds = time.process_time() - begin
        plan = self.plan(scores, run.best)
        tested = self.tested(attrim.apply(self.dense, plan), plan, images, seed)
        result = {"held out": run.value, "curve": run.curve, "kept": list(run.best), "seconds": seconds, **tested}
        line = "".join(f"  {k} {100 * v:.2f}" for k, v in {"held out": run.value, **tested}.items())
        say(f"  seed {seed} {name:<14} {len(run.trials):4d} evaluations {seconds:6.0f} s{line}")
        return result

    def tested(self, small: nn.Module, plan: attrim.PruningPlan, images: list[Pair], seed: int) -> dict[str, float]:
        """Test accuracy step by step."""
        steps: dict[str, Callable[[], nn.Module]] = {
            "recalibrated": lambda: recalibrate(small, images, limit=None),
            "free": lambda: free_recovery(self.dense, small, plan, images),
        }
        networks = {name: step() for name, step in steps.items()}
        if self.options.tune:
            train = self.data.batches("train", augment=True, shuffle=True)
            networks["fine-tuned"] = finetune(
                networks["free"], train, epochs=self.options.tune, seed=seed, teacher=self.dense, lr=self.options.lr
            )
        return {name: evaluate(network, self.test) for name, network in networks.items()}


def search(
    bench: Bench,
    name: str,
    objective: FastObjective,
    space: Space,
    scores: attrim.Scores,
    seed: int,
    batches: list[list[Point]],
) -> Found:
    """Carry a search out; the batches that it asked for are noted."""

    def evaluated(points: Any) -> list[float]:
        batches.append(list(points))
        return [judged.value for judged in objective.judge(points)]

    judge: Evaluate = evaluated
    start = start_of("global" if name == "global" else "uniform", scores)
    proposals = SEARCHES[name](space, start, seed)
    return optimise(proposals, judge, space, evaluations=bench.options.evaluations)


def report(network: str, found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Mean and range over the seeds."""
    say(f"\n{network}: mean (lowest .. highest) in %")
    for name, runs in found.items():
        say(f"  {name}")
        for what in (key for key in runs[0] if key not in ("curve", "kept", "seconds")):
            values = [100 * run[what] for run in runs]
            say(f"    {what:<14} {statistics.mean(values):6.2f}  ({np.min(values):.2f} .. {np.max(values):.2f})")


PARTS: Mapping[str, Callable[[Bench], Any]] = {
    "speed": Bench.speed,
    "compare": Bench.compare,
    "two": Bench.two,
    "maps": maps,
    "proxy": proxy,
}


if __name__ == "__main__":
    main()
