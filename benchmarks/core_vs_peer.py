"""attrim's core beside Torch-Pruning 1.6.1 in the same run: trace + plan + apply to half the multiply-adds.

    python benchmarks/core_vs_peer.py                       # about ten minutes on two cores
    python benchmarks/core_vs_peer.py --networks ResNet-50 --repeats 9
    python benchmarks/core_vs_peer.py --full --json core.json   # the peer on the deep networks too (an hour)

CPU seconds of one thread; the sides take turns (A B A B), medians with the smallest and largest value (the largest is
usually the first run in a process). Memory is the peak above the loaded libraries, each side in a process of its own,
against the network plus one forward pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attrim
from memory import measure
from networks import CHAINS, DENSE, NETWORKS, Case
from sides import SIDES, warm_up

BOUNDS = {"ResNet-50": 0.5, "DenseNet-121": 0.1, "MobileNetV2": 1.0, "ResNet-56 CIFAR": 1.0}
MAX_EXPONENT, MAX_MEMORY = 1.15, 2.0
OURS, PEER = SIDES


def main() -> None:
    """Measure and print."""
    options = _options()
    for side in SIDES:
        warm_up(side)
    say(f"attrim {attrim.__version__}, Torch-Pruning {version('torch-pruning')}, torch {torch.__version__}, ")
    say(f"Python {platform.python_version()}, one thread, {options.repeats} repeats.\n")
    found: dict[str, Any] = {"repeats": options.repeats, "torch": torch.__version__}
    found["time"] = side_by_side({name: NETWORKS[name] for name in options.networks}, options.repeats)
    if not options.only_time:
        found["memory"] = memory(options.networks)
        found["growth"] = {
            name: growth(name, cases, min(3, options.repeats), options.full)
            for name, cases in (("residual chain", CHAINS), ("DenseNet", DENSE))
        }
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, help="how often each side runs (default 5)")
    parser.add_argument("--full", action="store_true", help="measure the growth of the peer as well (slow)")
    parser.add_argument("--only-time", action="store_true", help="leave out memory and growth")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    return parser.parse_args()


def say(text: str) -> None:
    """A line now, not when a buffer is full."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def row(*cells: object) -> None:
    """A line of a Markdown table."""
    say("| " + " | ".join(map(str, cells)) + " |")


def head(*cells: str) -> None:
    """The first two lines of a Markdown table."""
    row(*cells)
    row(*("---" for _ in cells))


def side_by_side(cases: dict[str, Case], repeats: int) -> dict[str, Any]:
    """CPU seconds of both sides, taking turns."""
    found: dict[str, Any] = {}
    head(
        "network",
        "attrim s",
        "trace / plan / apply",
        "Torch-Pruning s",
        "ratio",
        "bound",
        "holds",
        "MACs kept",
        "peer's",
    )
    for name, case in cases.items():
        model, inputs = case.make()
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        stages: dict[str, list[float]] = {}
        kept, steps = {}, 0
        for _ in range(repeats):
            for side, run in SIDES.items():
                outcome = run(model, inputs, case.classifier)
                seconds[side].append(outcome.total)
                kept[side] = outcome.kept
                if side == OURS:
                    for stage, value in outcome.seconds.items():
                        stages.setdefault(stage, []).append(value)
                else:
                    steps = outcome.steps
        ratio = statistics.median(seconds[OURS]) / statistics.median(seconds[PEER])
        parts = " / ".join(f"{statistics.median(values):.3f}" for values in stages.values())
        row(
            name, spread(seconds[OURS]), parts, f"{spread(seconds[PEER])}, {steps} steps", f"{ratio:.2f}x",
            f"{BOUNDS[name]:g}x", "yes" if ratio <= BOUNDS[name] else "NO", f"{kept[OURS]:.4f}", f"{kept[PEER]:.4f}",
        )  # fmt: skip
        found[name] = {"seconds": seconds, "stages": stages, "ratio": ratio, "kept": kept, "steps": steps}
    say("")
    return found


def spread(values: Sequence[float]) -> str:
    """Median, and the range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def memory(names: Iterable[str]) -> dict[str, Any]:
    """Peak memory of both sides against the network plus one forward pass."""
    found: dict[str, Any] = {}
    head("network", "network + forward MiB", "attrim MiB", "ratio", "bound", "holds", "Torch-Pruning MiB", "ratio")
    for name in names:
        marks = {side: measure(side, name) for side in SIDES}
        ratio = {side: mark["work"] / mark["forward"] for side, mark in marks.items()}
        row(
            name, f"{marks[OURS]['forward']:.0f}", f"{marks[OURS]['work']:.0f}", f"{ratio[OURS]:.2f}x",
            f"{MAX_MEMORY:g}x", "yes" if ratio[OURS] <= MAX_MEMORY else "NO", f"{marks[PEER]['work']:.0f}",
            f"{ratio[PEER]:.2f}x",
        )  # fmt: skip
        found[name] = {"MiB": marks, "ratio": ratio}
    say("")
    return found


def growth(family: str, cases: dict[str, Case], repeats: int, full: bool) -> dict[str, Any]:
    """CPU seconds against depth; the exponent is the slope of a straight line through both logarithms."""
    sides = [OURS, PEER] if full else [OURS]
    found: dict[str, Any] = {"depth": [case.depth for case in cases.values()], "seconds": {}, "exponent": {}}
    head(f"{family}, depth", *(str(d) for d in found["depth"]), "exponent", "bound", "holds")
    for side in sides:
        medians = []
        for case in cases.values():
            model, inputs = case.make()
            runs = [SIDES[side](model, inputs, case.classifier).total for _ in range(repeats if side == OURS else 1)]
            medians.append(statistics.median(runs))
        exponent = float(np.polyfit(np.log(found["depth"]), np.log(medians), 1)[0])
        mine = side == OURS
        row(
            f"{side}, s", *(f"{s:.3f}" for s in medians), f"{exponent:.2f}", MAX_EXPONENT if mine else "",
            ("yes" if exponent <= MAX_EXPONENT else "NO") if mine else "",
        )  # fmt: skip
        found["seconds"][side], found["exponent"][side] = medians, exponent
    say("")
    return found


if __name__ == "__main__":
    main()
