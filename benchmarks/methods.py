"""What the papers behind the methods claim, measured on a CIFAR ResNet with every control beside it.

    python benchmarks/methods.py --data DATA --checkpoints DIR                     # ResNet-20, under 45 minutes on two cores
    python benchmarks/methods.py --data DATA --checkpoints DIR --parts globalpru --json FILE
    python benchmarks/methods.py --data DATA --checkpoints DIR --full              # for a GPU

DATA is a data source as ``attrim prune --data`` takes it (CIFAR-10); DIR holds NETWORK-cifar10-jpeg.safetensors.

``pcas``: the global attention ranking against L1, batch-norm scale, mean activation and random channels at equal
multiply-adds, before and after the same recovery; how steady the ranking is over seeds and parts of the data.
``globalpru``: agreement of the samples on one order (Kendall tau, top-k overlap) before and after the sparse training, the
gap between masks for each sample and the shared mask, and the ablations.
``dcpa``: the policies ``se``, ``xattn`` and ``free`` against uniform and random widths at equal multiply-adds with equal
training, with and without branches that may vanish; how alike the policies of different seeds are.

Only channels inside the blocks. Accuracy on the first test images: nothing is chosen by it. ``--json`` keeps what
``benchmarks/figures.py`` draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attrim
from attrim.methods.dcpa import dcpa
from attrim.methods.globalpru import globalpru
from attrim.methods.pcas import pcas
from attrim.recover import evaluate, finetune, free_recovery, recalibrate
from cifar import INSIDE, Pair, first, open_cifar, say, trained

PARTS = ("pcas", "globalpru", "dcpa")

POLICIES: Mapping[str, Mapping[str, Any]] = {
    # more parameters make a larger step of the policy at the same rate, so `free` gets twice the rate of the others
    "se": {"kind": "se"},
    "xattn": {"kind": "xattn"},
    "free": {"kind": "free", "policy_lr": 2.0},
    "se, width only": {"kind": "se", "drop": False},
    "free, width only": {"kind": "free", "drop": False, "policy_lr": 2.0},
    "uniform": {"kind": "uniform", "drop": False},
    "random": {"kind": "random", "drop": False},
}

CONTROLS = ("l1", "bn_scale", "mean activation", "random")

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "GlobalPru": {},
    "vote only": {"strength": 0.0, "sparsity": 0.0},
    "mean attention": {"vote": "mean"},
    "random order": {"vote": "random"},
}
"""Name -> options; the first is the method as it is."""


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", attrim.AttrimWarning)
    say(f"attrim {attrim.__version__}, torch {torch.__version__}, {options.threads} thread(s), {options.network}")
    bench = Bench(options)
    found: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("data", "checkpoints")}
    }
    for part in options.parts:
        found[part] = getattr(bench, part)()
        if options.json:
            Path(options.json).write_text(json.dumps(found) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as attrim prune --data takes it")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with NETWORK-cifar10-jpeg.safetensors")
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--parts", nargs="+", default=["pcas", "globalpru", "dcpa"], choices=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--macs", type=float, default=0.5, help="share that is kept (default 0.5)")
    parser.add_argument("--rows", type=int, default=5000, help="training rows (default 5000)")
    parser.add_argument("--epochs", type=int, default=3, help="of training gates and of sparse training (default 3)")
    parser.add_argument("--warmup-epochs", type=int, default=3, help="of GlobalPru, before the vote (default 3)")
    parser.add_argument("--strength", type=float, default=5.0, help="of GlobalPru's ranking loss (default 5)")
    parser.add_argument("--search-epochs", type=int, default=5, help="of the search of DCP-A (default 5)")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), help="of DCP-A")
    parser.add_argument("--policy-lr", type=float, default=0.01, help="of DCP-A, for a short search (default 0.01)")
    parser.add_argument("--tune", type=int, default=2, help="epochs of fine-tuning behind the cut (default 2)")
    parser.add_argument("--test-images", type=int, default=2000, help="a prefix of the test split (default 2000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="ResNet-56, all rows, all test images, longer training")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if options.full:
        options.network, options.rows, options.test_images = "resnet56", 45_000, 10_000
        options.warmup_epochs, options.epochs, options.tune, options.search_epochs, options.policy_lr = (
            20,
            40,
            40,
            100,
            3e-3,
        )
    return options


class Bench:
    """The network and its data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.dense = trained(options.network, options.checkpoints).to(self.device)
        self.data = open_cifar(options.data, options.rows)
        self.test = list(first(self.data.batches("test"), options.test_images))
        self.channels = attrim.trace(self.dense, torch.randn(1, 3, 32, 32, device=self.device))
        self.budget = attrim.Budget(macs=options.macs, frozen=INSIDE, scope="global")
        say(f"dense {evaluate(self.dense, self.test):.2%} on {options.test_images} test images")

    def plain(self, rows: int | None = None) -> list[Pair]:
        """Training images as they are."""
        return list(first(self.data.batches("train"), rows or self.options.rows))

    def augmented(self, seed: int, count: int = 1024) -> list[Pair]:
        """Cropped and flipped training images."""
        batches = self.data.batches("train", augment=True, shuffle=True)
        batches.set_epoch(1000 + seed)
        return list(first(batches, count))

    def training(self) -> Any:
        """What is trained on."""
        return self.data.batches("train", augment=True, shuffle=True)

    def after(self, dense: nn.Module, plan: attrim.PruningPlan, seed: int) -> dict[str, float]:
        """Accuracy of the cut network, step by step of the same recovery for all."""
        images = self.augmented(seed)
        small = attrim.apply(dense, plan)
        free = free_recovery(dense, small, plan, images)
        tuned = finetune(free, self.training(), epochs=self.options.tune, seed=seed, teacher=self.dense, lr=0.03)
        steps = {"cut": small, "recalibrated": recalibrate(small, images), "free": free, "fine-tuned": tuned}
        return {name: evaluate(network, self.test) for name, network in steps.items()}

    def pcas(self) -> dict[str, Any]:
        """Attention against the controls, and how steady it is."""
        runs: dict[str, list[dict[str, float]]] = {}
        attention: dict[str, dict[str, list[float]]] = {}
        kept: dict[str, dict[str, list[int]]] = {}
        plain = self.plain()
        for seed in self.options.seeds:
            outcome = self._attention(plain, seed)
            attention[f"seed {seed}"] = _lists(outcome.scores.values)
            for name, scores in {"pcas": outcome.scores, **self._controls(plain, seed)}.items():
                plan = attrim.allocate(self.channels, scores, self.budget)
                found = self.after(self.dense, plan, seed)
                runs.setdefault(name, []).append(found)
                counts = kept.setdefault(name, {})
                for group in outcome.scores.values:
                    counts.setdefault(group, []).append(int(plan.groups[group]["kept"]))
                say(
                    f"  seed {seed} {name:<16}"
                    + "".join(f"  {step} {100 * value:6.2f}" for step, value in found.items())
                )
        for part in (0.1, 0.3):
            rows = int(part * self.options.rows)
            few = self._attention(self.plain(rows), self.options.seeds[0], epochs=round(self.options.epochs / part))
            attention[f"{part:.0%} of the data"] = _lists(few.scores.values)
        table(f"{self.options.network}, {self.options.macs:.0%} of the MACs, one threshold", runs)
        steadiness = correlations(attention)
        for pair, value in steadiness.items():
            say(f"  rank correlation of the attention, {pair}: {value:.2f}")
        sizes = {group: self.channels[group].size for group in next(iter(attention.values()))}
        return {"runs": runs, "attention": attention, "kept": kept, "sizes": sizes, "correlation": steadiness}

    def _attention(self, plain: list[Pair], seed: int, epochs: int | None = None) -> Any:
        rows = sum(len(x) for x, _ in plain)
        data = open_cifar(self.options.data, rows)
        return pcas(
            self.dense,
            self.channels,
            plain,
            budget=self.budget,
            augmented=data.batches("train", augment=True, shuffle=True),
            epochs=self.options.epochs if epochs is None else epochs,
            seed=seed,
        )

    def _controls(self, plain: list[Pair], seed: int) -> dict[str, attrim.Scores]:
        score = attrim.score
        return {
            "l1": score(self.dense, self.channels, "l1"),
            "bn_scale": score(self.dense, self.channels, "bn_scale"),
            "mean activation": score(self.dense, self.channels, mean_activation, plain),
            "random": score(self.dense, self.channels, "random", seed=seed),
        }

    def globalpru(self) -> dict[str, Any]:
        """The method and its ablations."""
        runs: dict[str, list[dict[str, float]]] = {}
        diaries: dict[str, list[Any]] = {}
        plain = self.plain()
        holdout = list(first(self.data.batches("holdout"), 1000))
        for seed in self.options.seeds:
            for name, extra in ABLATIONS.items():
                outcome = globalpru(
                    self.dense,
                    self.channels,
                    plain,
                    budget=attrim.Budget(macs=self.options.macs, frozen=INSIDE),
                    augmented=self.training(),
                    holdout=holdout,
                    seed=seed,
                    warmup_epochs=self.options.warmup_epochs,
                    warmup_lr=0.05,
                    epochs=self.options.epochs,
                    lr=0.05,
                    **{"strength": self.options.strength, **extra},
                )
                diary = list(outcome.statistics["epochs"])
                diaries.setdefault(name, []).append(diary)
                found = {**_agreement(diary), **self.after(outcome.model_to_cut, outcome.plan, seed)}
                runs.setdefault(name, []).append(found)
                say(f"  seed {seed} {name:<16}" + "".join(f"  {k} {v:.3f}" for k, v in found.items()))
        table(f"{self.options.network}, {self.options.macs:.0%} of the MACs, the same ratio everywhere", runs)
        return {"runs": runs, "diaries": diaries}

    def dcpa(self) -> dict[str, Any]:
        """Policies and controls."""
        runs: dict[str, list[dict[str, float]]] = {}
        reports: dict[str, list[Any]] = {}
        candidates: dict[str, dict[str, list[str]]] = {}
        widths: dict[str, dict[str, dict[str, int]]] = {}
        for seed in self.options.seeds:
            for name in self.options.policies:
                extra = POLICIES[name]
                outcome = dcpa(
                    self.dense,
                    self.channels,
                    self.training(),
                    budget=attrim.Budget(macs=self.options.macs),  # what is frozen cannot vanish with its block
                    seed=seed,
                    epochs=self.options.search_epochs,
                    **{**extra, "policy_lr": extra.get("policy_lr", 1.0) * self.options.policy_lr},
                )
                reports.setdefault(name, []).append(list(outcome.statistics["epochs"]))
                candidates[name] = outcome.statistics["candidates"]
                macs = outcome.plan.provenance["macs_after"] / outcome.plan.provenance["macs_before"]
                small = attrim.apply(outcome.model_to_cut, outcome.plan)
                tuned = finetune(
                    small, self.training(), epochs=self.options.tune, seed=seed, teacher=self.dense, lr=0.03
                )
                found = {
                    "MACs": macs,
                    "dropped": float(len(outcome.plan.provenance.get("branches", ()))),
                    "searched": evaluate(small, self.test),
                    "fine-tuned": evaluate(tuned, self.test),
                }
                runs.setdefault(name, []).append(found)
                groups = outcome.plan.groups
                kept = {
                    g: int(groups[g]["kept"]) if g in groups else 0 for g in outcome.scores.values
                }  # 0: its block went
                widths.setdefault(name, {})[f"seed {seed}"] = kept
                say(
                    f"  seed {seed} {name:<17}" + "".join(f"  {k} {v:.4f}" for k, v in found.items()),
                    f"  {list(kept.values())}",
                )
        table(f"{self.options.network}, {self.options.macs:.0%} of the MACs", runs)
        alike = {
            name: statistics.mean(_policy_correlations(list(found.values()), self.channels))
            for name, found in widths.items()
            if len(found) > 1
        }
        for name, value in alike.items():
            say(f"  rank correlation of the widths between seeds, {name}: {value:.2f}")
        return {"runs": runs, "reports": reports, "candidates": candidates, "widths": widths, "correlation": alike}


def _policy_correlations(found: list[dict[str, int]], channels: attrim.ChannelMap) -> list[float]:
    """Of the kept fractions, for every pair of seeds; 0 where all groups keep the same fraction."""
    vectors = [torch.tensor([kept[g] / channels[g].size for g in kept]) for kept in found]
    pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]]
    return [_spearman(a, b) if a.unique().numel() > 1 and b.unique().numel() > 1 else 0.0 for a, b in pairs]


def _agreement(diary: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Before and after the sparse training: means over groups, in how many groups agreement rose, and the masks' gap."""
    entries = list(diary)
    begin = next(e for e in entries if e["stage"] == "vote-0")
    end = next(e for e in entries if e["stage"] == "end")
    found: dict[str, float] = {}
    for what in ("tau", "overlap"):
        pairs = [(begin["agreement"][g][what], end["agreement"][g][what]) for g in end["agreement"]]
        found |= {f"{what} before": begin[what], f"{what} after": end[what]}
        found[f"{what} rose in"] = sum(b < a for b, a in pairs) / len(pairs)
    for when, entry in (("before", begin), ("after", end)):
        found[f"gap {when}"] = entry["masks"]["gap"]
        found[f"shared mask {when}"] = entry["masks"]["shared"]
    return found


def mean_activation(model: nn.Module, channels: attrim.ChannelMap, batches: Iterable[Any]) -> attrim.Scores:
    """Mean over images of the mean absolute output of each channel, behind its activation; a control."""
    sums: dict[str, Tensor] = {}
    places = {
        group.id: next((t for t in reversed(group.taps) if t.kind in ("act", "norm")), None) for group in channels
    }
    modules = dict(model.named_modules())
    seen = 0

    def watcher(group: str, tap: Any) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            means = out.relu().mean((2, 3)).double().sum(0)
            sums[group] = sums.get(group, torch.zeros_like(means)) + means

        return note

    handles = [modules[t.module].register_forward_hook(watcher(g, t)) for g, t in places.items() if t is not None]
    try:
        with torch.no_grad():
            for x, _ in batches:
                model(x)
                seen += len(x)
    finally:
        for handle in handles:
            handle.remove()
    values = {g: (s / seen).float() for g, s in sums.items() if len(s) == channels[g].size}
    return attrim.Scores(values, "mean activation")


def correlations(runs: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
    """Mean over groups of Spearman's rank correlation, for every pair of runs."""
    names = list(runs)
    found = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            values = [_spearman(torch.tensor(runs[a][g]), torch.tensor(runs[b][g])) for g in runs[a]]
            found[f"{a} / {b}"] = statistics.mean(values)
    return found


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ties share the mean of their ranks."""
    below = (values[:, None] > values[None, :]).sum(1).double()
    equal = (values[:, None] == values[None, :]).sum(1).double()
    return below + (equal - 1) / 2


def _lists(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {group: [round(v, 6) for v in value.tolist()] for group, value in values.items()}


def table(title: str, runs: Mapping[str, list[dict[str, float]]]) -> None:
    """Mean and range over the seeds."""
    say(f"\n{title}, {len(next(iter(runs.values())))} seeds: mean (lowest .. highest)")
    for name, found in runs.items():
        say(f"  {name}")
        for step in found[0]:
            values = [run[step] for run in found]
            say(f"    {step:<22} {statistics.mean(values):8.4f}  ({min(values):.4f} .. {max(values):.4f})")


if __name__ == "__main__":
    main()
