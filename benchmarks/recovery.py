"""Accuracy won back after a cut, technique by technique, on CIFAR ResNets; and what fine-tuning adds.

    python benchmarks/recovery.py --data DATA --checkpoints DIR                 # ResNet-20, about half an hour on two cores
    python benchmarks/recovery.py --data DATA --checkpoints DIR --networks resnet20 resnet56 --test-images 10000
    python benchmarks/recovery.py --data DATA --checkpoints DIR --parts finetune
    python benchmarks/recovery.py --parts timing                                # ResNet-50, needs no data

DATA is a data source as ``attrim prune --data`` takes it (CIFAR-10); DIR holds NETWORK-cifar10-jpeg.safetensors. Half of
the multiply-adds, only channels inside the blocks; for every criterion and seed all techniques get the same cut network,
and the same augmented calibration images. Accuracy on the first test images: nothing is chosen by it. ``--full`` takes
both networks, all test images and 50 000 training rows (for a GPU).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attrim
from attrim.recover import evaluate, finetune, fold_bias, free_recovery, recalibrate, reconstruct
from cifar import INSIDE, Pair, first, open_cifar, say, trained

UNIFORM = ("l2", "fpgm", "taylor", "random")
NEEDS_DATA = ("taylor", "refit", "obs")


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "attrim": attrim.__version__, "macs": options.macs}
    say(f"attrim {attrim.__version__}, torch {torch.__version__}, {options.threads} thread(s), device {options.device}")
    if "timing" in options.parts:
        found["timing"] = timing(options)
    for network in options.networks if {"table", "finetune"} & set(options.parts) else ():
        bench = Bench(options, network)
        if "table" in options.parts:
            found[network] = bench.table()
        if "finetune" in options.parts:
            found[f"{network} finetune"] = bench.finetuning()
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 as attrim prune --data takes it")
    parser.add_argument("--checkpoints", type=Path, help="folder with NETWORK-cifar10-jpeg.safetensors")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=["resnet20", "resnet56"])
    parser.add_argument("--criteria", nargs="+", default=[*UNIFORM, "refit"])
    parser.add_argument("--techniques", nargs="+", help="only those whose name holds one of these words")
    parser.add_argument("--parts", nargs="+", default=["table"], choices=["table", "finetune", "timing"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--macs", type=float, default=0.5, help="share that is kept (default 0.5)")
    parser.add_argument("--calibration", type=int, default=1024, help="images (default 1024)")
    parser.add_argument("--test-images", type=int, default=2000, help="a prefix of the test split (default 2000)")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows for fine-tuning (default 10000)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--timing-images", type=int, default=128, help="ResNet-50 at 224 x 224 (default 128)")
    parser.add_argument("--timing-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="both networks, all test images, all training rows")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if options.full:
        options.networks, options.test_images, options.rows = ["resnet20", "resnet56"], 10_000, 45_000
    if {"table", "finetune"} & set(options.parts) and not (options.data and options.checkpoints):
        parser.error("the parts table and finetune need --data and --checkpoints")
    return options


class Bench:
    """One network, its data, and its cuts."""

    def __init__(self, options: argparse.Namespace, network: str) -> None:
        self.options, self.name, self.device = options, network, torch.device(options.device)
        self.dense = trained(network, options.checkpoints).to(self.device)
        rows = max(options.rows, 2 * options.calibration)
        self.data = open_cifar(options.data, rows)
        self.test = list(first(self.data.batches("test"), options.test_images))
        self.channels = attrim.trace(self.dense, torch.randn(1, 3, 32, 32, device=self.device))
        self.dense_accuracy = evaluate(self.dense, self.test)
        say(f"\n{network}: dense {self.dense_accuracy:.2%} on {options.test_images} test images")

    def calibration(self, seed: int) -> list[Pair]:
        """Augmented training images."""
        batches = self.data.batches("train", augment=True, shuffle=True)
        batches.set_epoch(1000 + seed)
        return list(first(batches, self.options.calibration))

    def cut(self, criterion: str, seed: int, images: list[Pair]) -> tuple[nn.Module, attrim.PruningPlan]:
        """The pruned network: uniform ratios for the usual criteria, one global threshold for ``refit``."""
        extra = {"seed": seed} if criterion == "random" else {}
        scores = attrim.score(
            self.dense, self.channels, criterion, images if criterion in NEEDS_DATA else None, **extra
        )
        scope = "group" if criterion in UNIFORM else "global"
        budget = attrim.Budget(macs=self.options.macs, frozen=INSIDE, scope=scope)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attrim.AttrimWarning)
            plan = attrim.allocate(self.channels, scores, budget)
        return attrim.apply(self.dense, plan), plan

    def table(self) -> dict[str, Any]:
        """Accuracy and seconds of every technique for every criterion."""
        found: dict[str, Any] = {"dense": self.dense_accuracy}
        for criterion in self.options.criteria:
            runs: dict[str, list[tuple[float, float]]] = {}
            for seed in self.options.seeds:
                images = self.calibration(seed)
                small, plan = self.cut(criterion, seed, images)
                for technique, run in self.techniques(small, plan, images).items():
                    begin = time.perf_counter()
                    recovered = run()
                    seconds = time.perf_counter() - begin
                    runs.setdefault(technique, []).append((evaluate(recovered, self.test), seconds))
            found[criterion] = runs
            self._print(criterion, runs)
        if importlib.util.find_spec("torch_pruning"):
            found["Torch-Pruning L2"] = self.peer()
            self._print("Torch-Pruning L2", found["Torch-Pruning L2"])
        return found

    def techniques(
        self, small: nn.Module, plan: attrim.PruningPlan, images: list[Pair]
    ) -> dict[str, Callable[[], nn.Module]]:
        """What is compared; each starts from the same cut network."""
        dense, wanted = self.dense, self.options.techniques
        known = {
            "cut only": lambda: small,
            "bias folding": lambda: fold_bias(dense, small, plan, images),
            "recalibration": lambda: recalibrate(small, images),
            "consumers, each alone": lambda: reconstruct(
                dense, small, plan, images, sequence=False, layers="consumers"
            ),
            "consumers, in sequence": lambda: reconstruct(dense, small, plan, images, layers="consumers"),
            "all layers, in sequence": lambda: reconstruct(dense, small, plan, images),
            "the same, then recalibration": lambda: recalibrate(reconstruct(dense, small, plan, images), images),
            "recover='free'": lambda: free_recovery(dense, small, plan, images),
        }
        return {name: run for name, run in known.items() if wanted is None or any(word in name for word in wanted)}

    def peer(self) -> dict[str, list[tuple[float, float]]]:
        """Torch-Pruning's L2 criterion at the same multiply-adds, inside the blocks; recalibrated by attrim."""
        import torch_pruning as tp

        example = torch.randn(1, 3, 32, 32, device=self.device)
        whole = tp.utils.count_ops_and_params(self.dense, example)[0]
        runs: dict[str, list[tuple[float, float]]] = {"cut only": [], "recalibration": []}
        for seed in self.options.seeds:
            import copy

            small = copy.deepcopy(self.dense)
            kept_whole = [m for n, m in small.named_modules() if n in ("conv1", "linear") or n.endswith("conv2")]
            pruner = tp.pruner.BasePruner(
                small,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=1 - self.options.macs,
                ignored_layers=kept_whole,
            )
            begin = time.perf_counter()
            pruner.step()
            seconds = time.perf_counter() - begin
            kept = tp.utils.count_ops_and_params(small, example)[0] / whole
            say(f"  (Torch-Pruning keeps {kept:.1%} of the MACs)") if seed == self.options.seeds[0] else None
            runs["cut only"].append((evaluate(small, self.test), seconds))
            begin = time.perf_counter()
            measured = recalibrate(small, self.calibration(seed))
            runs["recalibration"].append((evaluate(measured, self.test), time.perf_counter() - begin))
        return runs

    def _print(self, criterion: str, runs: dict[str, list[tuple[float, float]]]) -> None:
        say(f"\n{self.name}, {criterion}")
        for technique, pairs in runs.items():
            accuracy = [100 * a for a, _ in pairs]
            seconds = statistics.median(s for _, s in pairs)
            spread = f"{min(accuracy):5.2f} .. {max(accuracy):5.2f}"
            say(f"  {technique:<30} {statistics.mean(accuracy):6.2f} %  ({spread})  {seconds:6.1f} s")

    def finetuning(self) -> dict[str, Any]:
        """A short schedule from the same cut, in several ways."""
        ways: dict[str, dict[str, Any]] = {
            "cosine, distilled": {"teacher": self.dense},
            "cosine, distilled, attention transfer": {
                "teacher": self.dense,
                "attention": 100.0,
                "channels": self.channels,
            },
            "cosine, labels only": {},
            "constant rate, distilled": {"teacher": self.dense, "schedule": "constant", "warmup": 0.0},
            "constant rate, labels only": {"schedule": "constant", "warmup": 0.0},
        }
        found: dict[str, list[float]] = {}
        for seed in self.options.seeds:
            images = self.calibration(seed)
            small, plan = self.cut("refit", seed, images)
            starts = {
                "recalibrated": recalibrate(small, images),
                "free": free_recovery(self.dense, small, plan, images),
            }
            for start, network in starts.items():
                found.setdefault(f"{start}: before", []).append(evaluate(network, self.test))
                for way, extra in ways.items() if start == "free" else list(ways.items())[:1]:
                    train = self.data.batches("train", augment=True, shuffle=True)
                    tuned = finetune(network, train, epochs=self.options.epochs, seed=seed, **extra)
                    found.setdefault(f"{start}: {way}", []).append(evaluate(tuned, self.test))
        say(f"\n{self.name}, refit channels, {self.options.epochs} epochs on {len(self.data.rows('train'))} rows")
        for name, values in found.items():
            values = [100 * v for v in values]
            say(f"  {name:<46} {statistics.mean(values):6.2f} %  ({min(values):5.2f} .. {max(values):5.2f})")
        return found


def timing(options: argparse.Namespace) -> dict[str, float]:
    """Processor time of reconstructing a ResNet-50, against the forward passes that it needs: one dense, one pruned."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    dense = resnet50().eval().to(options.device)
    batches = list(torch.split(torch.randn(options.timing_images, 3, 224, 224, device=options.device), 8))
    channels = attrim.trace(dense, batches[0][:1])
    plan = attrim.allocate(channels, attrim.score(dense, channels, "l2"), attrim.Budget(macs=options.macs))
    small = attrim.apply(dense, plan)
    ratios = []
    for _ in range(options.timing_repeats):
        begin = time.process_time()
        with torch.no_grad():
            for batch in batches:
                dense(batch), small(batch)
        forward = time.process_time() - begin
        begin = time.process_time()
        reconstruct(dense, small, plan, batches, samples=None)
        ratios.append((time.process_time() - begin) / forward)
    say(
        f"\nResNet-50, {options.timing_images} images at 224 x 224: reconstruction takes {statistics.median(ratios):.2f}x"
    )
    say(f"  the time of one dense and one pruned forward pass ({min(ratios):.2f} .. {max(ratios):.2f})")
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


if __name__ == "__main__":
    main()
