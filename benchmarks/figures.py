"""The figures of the documentation, drawn from what the benchmarks measured.

    python benchmarks/methods.py --data DATA --checkpoints DIR --json results/methods.json
    python benchmarks/search.py --data DATA --checkpoints DIR --parts compare two --json results/search.json
    python benchmarks/figures.py results/*.json --out docs/figures
    python benchmarks/figures.py results/*.json --data DATA --checkpoints DIR     # and the attention maps, which need the network

Each figure needs one part of a result file (named before the drawing functions below); what is not there is skipped and
named. Of several files with the same part the last one counts; the kept channels of all of them are compared, under the
files' names (``cifar10.json``, ``cifar100.json``).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attrim
from attrim.methods.globalpru.history import history
from attrim.report import Picture, architecture
from attrim.report import figures as draw
from cifar import first, open_cifar, say, trained, untrained

Result = Mapping[str, Any]
Found = Iterator[tuple[str, Callable[[], Picture]]]
"""File name -> what draws it."""


def main() -> None:
    """Draw all that there is data for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", nargs="*", type=Path, help="JSON files of benchmarks/methods.py and benchmarks/search.py"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--data", help="CIFAR-10 as attrim prune --data takes it, for the attention maps")
    parser.add_argument("--checkpoints", type=Path, help="folder with NETWORK-cifar10-jpeg.safetensors, likewise")
    parser.add_argument("--network", default="resnet56", choices=["resnet20", "resnet56"], help="likewise")
    options = parser.parse_args()
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in options.results}
    parts = {name: (part, result) for result in results.values() for name, part in result.items() if name in PARTS}
    drawn: set[str] = set()
    for name, (part, result) in parts.items():
        drawn |= save(PARTS[name](part, result["settings"]), options.out)
    drawn |= save(of_several(results), options.out)
    if options.data and options.checkpoints:
        drawn |= save(of_the_network(options), options.out)
    missing = [name for name in PARTS if name not in parts]
    say(f"{len(drawn)} figures in {options.out}" + (f"; no results for: {', '.join(missing)}" if missing else ""))


def save(found: Found, folder: Path) -> set[str]:
    """Draw and write; a figure whose data are not as expected is named and left out."""
    names = set()
    for name, picture in found:
        try:
            made = picture()
        except (KeyError, StopIteration, attrim.AttrimError) as error:
            say(f"  {name}: not drawn, {type(error).__name__}: {error}")
            continue
        made.save(folder / f"{name}.svg")
        names.add(name)
        say(f"  {name}.svg, {len(made.svg) / 1000:.0f} kB: {made.title}")
    return names


def by_step(runs: Mapping[str, list[Mapping[str, float]]], steps: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """Step of the recovery -> method -> accuracy of each seed, for the steps that were measured."""
    there = [step for step in steps if all(step in run for found in runs.values() for run in found)]
    return {step: {name: [run[step] for run in found] for name, found in runs.items()} for step in there}


def pcas(part: Result, settings: Result) -> Found:
    """From ``pcas`` of benchmarks/methods.py."""
    cost = f"{float(settings['macs']):.0%} of the MACs"
    attention = part["attention"]
    seeds = [name for name in attention if name.startswith("seed ")]
    yield (
        "pcas-attention",
        lambda: draw.attention_histograms(attention[seeds[0]], title="PCAS: mean attention of the channels"),
    )
    yield (
        "pcas-layers",
        lambda: draw.layer_attention(attention[seeds[0]], title="PCAS: mean attention, channels in order"),
    )
    yield "pcas-seeds", lambda: draw.rank_correlation(*square(part["correlation"], list(attention)), title="PCAS: rank correlation of the attention")  # fmt: skip
    yield "pcas-data", lambda: shares(part["correlation"], seeds)
    yield (
        "pcas-kept",
        lambda: draw.kept_by_layer(
            {name: part["kept"][name] for name in list(part["kept"])[:3]}, part["sizes"], title=f"Kept channels, {cost}"
        ),
    )
    yield (
        "pcas-accuracy",
        lambda: draw.grouped_bars(by_step(part["runs"], ("free", "fine-tuned")), title=f"Test accuracy, {cost}"),
    )


def globalpru(part: Result, settings: Result) -> Found:
    """From ``globalpru`` of benchmarks/methods.py."""
    diary = next(iter(part["diaries"].values()))[0]

    def agreement() -> Picture:
        found = history(diary)
        return draw.agreement_by_epoch(found.epochs, found.tau, found.overlap)

    yield "globalpru-agreement", agreement
    title = f"Test accuracy, {float(settings['macs']):.0%} of the MACs"
    yield "globalpru-accuracy", lambda: draw.grouped_bars(by_step(part["runs"], ("free", "fine-tuned")), title=title)


def dcpa(part: Result, settings: Result) -> Found:
    """From ``dcpa`` of benchmarks/methods.py."""
    first, seeds = next(iter(part["reports"].items()))
    reports = [report for report in seeds[0] if report.get("probabilities")]
    names = part.get("candidates", {}).get(first)
    moments = [reports[round(i * (len(reports) - 1) / 3)] for i in range(4)] if reports else []
    yield "dcpa-policy", lambda: draw.policy_map({int(r["epoch"]): r["probabilities"] for r in moments}, names)
    yield (
        "dcpa-costs",
        lambda: draw.policy_costs(
            [r["epoch"] for r in reports],
            [r["expected"]["macs"] for r in reports],
            [r["likeliest"]["macs"] for r in reports],
            reports[-1]["target"]["macs"],
            [r["tau"] for r in reports],
        ),
    )
    wanted = [name for name in ("se", "xattn", "free", "random") if name in part["widths"]]
    networks = {name: next(iter(part["widths"][name].values())) for name in wanted}
    yield "dcpa-architecture", lambda: architecture(channels_of(settings["network"]), networks)
    title = f"Test accuracy, {float(settings['macs']):.0%} of the MACs"
    yield "dcpa-accuracy", lambda: draw.grouped_bars(by_step(part["runs"], ("searched", "fine-tuned")), title=title)


def compare(part: Result, settings: Result) -> Found:
    """From ``compare`` of benchmarks/search.py."""
    runs = part["runs"]
    levels = {"uniform": statistics.mean(run["held out"] for run in runs["uniform"])}
    curves = {name: [run["curve"] for run in found] for name, found in runs.items() if name != "uniform"}
    yield "arpruning-search", lambda: draw.search_curves(curves, levels=levels)
    channels = channels_of(settings["network"])
    inside = [i for i, group in enumerate(part["groups"]) if any(run["kept"][i] < part["sizes"][i] for found in runs.values() for run in found)]  # fmt: skip
    sizes = {part["groups"][i]: part["sizes"][i] for i in inside}
    kept = {
        name: {part["groups"][i]: [run["kept"][i] for run in found] for i in inside} for name, found in runs.items()
    }
    title = f"Found keep ratios, {float(settings['macs']):.0%} of the MACs"
    yield "arpruning-ratios", lambda: draw.kept_by_layer(kept, sizes, share=True, title=title)
    networks = {name: dict(zip(part["groups"], found[0]["kept"], strict=True)) for name, found in runs.items()}
    yield "arpruning-architecture", lambda: architecture(channels, networks)


def two(part: Result, settings: Result) -> Found:
    """From ``two`` of benchmarks/search.py: the table of criterion and search."""
    step = "fine-tuned" if all("fine-tuned" in run for found in part["runs"].values() for run in found) else "free"
    table: dict[str, dict[str, list[float]]] = {}
    for name, found in part["runs"].items():
        criterion, _, search = name.partition(", ")
        table.setdefault(search, {})[criterion] = [run[step] for run in found]
    title = f"Test accuracy ({step}), {float(settings['macs']):.0%} of the MACs"
    yield "arpruning-two", lambda: draw.grouped_bars(table, title=title)


def proxy(part: Result, settings: Result) -> Found:
    """From a part ``proxy``: objective -> ``[values, accuracies after fine-tuning]`` of the same candidates."""
    del settings
    yield "arpruning-proxy", lambda: draw.proxy_scatter({name: tuple(pair) for name, pair in part.items()})


PARTS: Mapping[str, Callable[[Any, Any], Found]] = {
    "pcas": pcas, "globalpru": globalpru, "dcpa": dcpa, "compare": compare, "two": two, "proxy": proxy,
}  # fmt: skip


def of_several(results: Mapping[str, Result]) -> Found:
    """What PCAS keeps on each data set, where there are results of more than one."""
    kept = {name: result["pcas"]["kept"]["pcas"] for name, result in results.items() if "pcas" in result}
    if len(kept) > 1:
        sizes = next(result["pcas"]["sizes"] for result in results.values() if "pcas" in result)
        yield "pcas-datasets", lambda: draw.kept_by_layer(kept, sizes, title="PCAS: kept channels on each data set")


def of_the_network(options: argparse.Namespace) -> Found:
    """Attention maps and scores of a trained network, on held-out training images."""
    model = trained(options.network, options.checkpoints)
    channels = attrim.trace(model, torch.randn(1, 3, 32, 32))
    images = [x for x, _ in first(open_cifar(options.data, 5000).batches("holdout"), 256)]
    raw, scaled = (attrim.score(model, channels, "arpruning", images, scale=scale) for scale in ("raw", "relative"))
    inside = [g.id for g in channels if g.id.startswith("layer")]
    yield (
        "arpruning-spectra",
        lambda: draw.score_spectra(
            {g: raw.values[g] for g in inside},
            {g: scaled.values[g] for g in inside},
            title="Scores of arpruning in each layer",
        ),
    )
    layer = inside[len(inside) // 2]
    yield "arpruning-maps", lambda: maps(model, channels[layer], scaled.values[layer], images[0][:4])


def maps(model: torch.nn.Module, group: attrim.ChannelGroup, scores: Tensor, images: Tensor) -> Picture:
    """The layer's map without the lowest, the highest and random half of its channels."""
    tap = next(tap for tap in group.taps if tap.kind == "norm")
    seen: list[Tensor] = []
    handle = model.get_submodule(tap.module).register_forward_hook(lambda m, args, out: seen.append(out.double()))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    energy = seen[0].square()
    order, half = scores.argsort(), group.size // 2
    shuffled = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
    halves = {"lowest": order[half:], "highest": order[:-half], "random": shuffled[half:]}
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return draw.attention_maps(
        ((images - low) / (high - low)).permute(0, 2, 3, 1),
        energy.sum(1),
        {f"without the {name} half" if name != "random" else "without a random half": energy[:, stay].sum(1) for name, stay in halves.items()},
        title=f"Attention maps of {group.id} ({group.size} channels)",
    )  # fmt: skip


def channels_of(network: str) -> attrim.ChannelMap:
    """The traced network."""
    return attrim.trace(untrained(network), torch.randn(1, 3, 32, 32))


def square(pairs: Mapping[str, float], names: list[str]) -> tuple[list[list[float]], list[str]]:
    """``{"a / b": value}`` as a symmetric matrix with ones on the diagonal."""
    table = [
        [1.0 if a == b else pairs.get(f"{a} / {b}", pairs.get(f"{b} / {a}", float("nan"))) for b in names]
        for a in names
    ]
    return table, names


def shares(pairs: Mapping[str, float], seeds: list[str]) -> Picture:
    """Correlation of the rankings from a part of the data with those of all data, over the seeds of the latter."""
    rows: dict[float, list[float]] = {}
    for pair, value in pairs.items():
        seed, _, other = pair.partition(" / ")
        if seed in seeds and other.endswith("% of the data"):
            rows.setdefault(float(other.split("%")[0]) / 100, []).append(value)
    shares = sorted(rows)
    table = [list(column) for column in zip(*(rows[share] for share in shares), strict=True)]
    return draw.correlation_by_data(shares, {"PCAS, against each seed on all data": table})


if __name__ == "__main__":
    main()
