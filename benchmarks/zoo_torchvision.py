"""Every classification model of torchvision, and a list from timm: traced, cut to half its multiply-adds, verified.

    python benchmarks/zoo_torchvision.py                          # all (an hour or two on two cores)
    python benchmarks/zoo_torchvision.py --models resnet18 timm:convnext_atto --json zoo.json

Random weights. Each model runs in a process of its own, so one that fails or does not fit takes nothing with it. A row
gives the channel groups, the prunable channels, the share of the multiply-adds that depends on them, whether the cut is
exact, the largest error of the proof and the seconds for trace and verification; or why there is no cut.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["TIMM", "check"]

TIMM = (
    "resnet18", "resnet50d", "resnetv2_50", "resnext50_32x4d", "seresnet50", "skresnet18", "ecaresnet50t",
    "res2net50_26w_4s", "resnest14d", "regnetx_004", "regnety_004", "densenet121", "vgg11_bn", "mobilenetv2_100",
    "mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0", "efficientnetv2_rw_t", "ghostnet_100",
    "mnasnet_100", "fbnetc_100", "hardcorenas_a", "rexnet_100", "tinynet_e", "repvgg_a0", "dla34",
    "hrnet_w18_small", "inception_v3", "xception41", "dpn68", "cspresnet50", "cspdarknet53", "darknet53",
    "vovnet39a", "convnext_atto", "convnextv2_atto", "convmixer_768_32", "poolformer_s12", "edgenext_xx_small",
    "mobileone_s0", "mobilevit_xxs", "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0",
    "twins_pcpvt_small", "coat_tiny", "crossvit_tiny_240", "levit_128s", "efficientformer_l1",
    "beit_base_patch16_224",
)  # fmt: skip
"""One or two of each family."""

COLUMNS = (
    "model",
    "M params",
    "groups",
    "channels",
    "prunable MACs",
    "MACs kept",
    "exact",
    "max error",
    "trace s",
    "verify s",
)
LARGE_INPUT = {"inception_v3": 299}


def names() -> list[str]:
    """All models of the default run."""
    import torchvision

    return [*torchvision.models.list_models(module=torchvision.models), *(f"timm:{name}" for name in TIMM)]


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with seeded random weights in eval mode, and an image for it."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        model = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        size = model.pretrained_cfg.get("input_size", (3, 224, 224))
        return model.eval(), torch.randn(1, *size)
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    side = LARGE_INPUT.get(name, 224)
    return model.eval(), torch.randn(1, 3, side, side)


def _millions(name: str) -> float | None:
    """Parameters without memory for them; None for a model whose constructor needs real tensors."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(name)[0].parameters()) / 1e6
    except (NotImplementedError, RuntimeError):
        return None


def check(name: str, keep: float, max_params: float) -> dict[str, Any]:
    """Everything that the table says about a model."""
    import attrim

    warnings.simplefilter("ignore", attrim.AttrimWarning)
    params = _millions(name)
    if params is not None and params > max_params:
        return {"model": name, "M params": params, "failure": f"not run: more than {max_params:g} M parameters"}
    model, inputs = build(name)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    start = time.process_time()
    channels = attrim.trace(model, inputs)
    traced = time.process_time() - start
    whole, bare = channels.cost.macs(), channels.cost.macs([0] * len(channels))
    row = {
        "model": name, "M params": params, "groups": len(channels), "channels": channels.cost.channels(),
        "prunable MACs": 1 - bare / whole, "trace s": traced,
    }  # fmt: skip
    scores = attrim.score(model, channels, "l2", missing="skip", progress=False)
    plan = attrim.allocate(channels, scores, attrim.Budget(macs=keep))
    small = attrim.apply(model, plan)
    start = time.process_time()
    proof = attrim.verify(model, small, plan, inputs)
    row |= {
        "MACs kept": plan.provenance["macs_after"] / whole, "ok": proof.ok, "exact": proof.exact, "proof": str(proof),
        "max error": proof.max_error if proof.exact else proof.exact_error, "verify s": time.process_time() - start,
    }  # fmt: skip
    return row if proof.ok else {**row, "failure": str(proof)}


def _work(name: str, keep: float, max_params: float, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        pipe.send(check(name, keep, max_params))
    except Exception as error:  # the table shows whatever went wrong
        pipe.send({"model": name, "failure": f"{type(error).__name__}: {error}"})


def in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """:func:`check` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(name, options.keep, options.max_params, options.threads, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(options.timeout):
            process.kill()
            return {"model": name, "failure": f"not finished after {options.timeout} s"}
        row: dict[str, Any] = ours.recv()
    except EOFError:
        row = {"model": name, "failure": "the process ended without a word (out of memory?)"}
    process.join()
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    if "failure" in row:
        size = f"{row['M params']:.1f}" if "M params" in row else ""
        groups = row.get("groups", "")
        return f"| {row['model']} | {size} | {groups} | {' '.join(row['failure'].split())[:300]} |" + " |" * (
            len(COLUMNS) - 4
        )
    cells = (
        row["model"], f"{row['M params']:.1f}", row["groups"], row["channels"], f"{row['prunable MACs']:.3f}",
        f"{row['MACs kept']:.3f}", "yes" if row["exact"] else "no", f"{row['max error']:.1e}", f"{row['trace s']:.1f}",
        f"{row['verify s']:.1f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="torchvision names, or timm:NAME")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the MACs that stays (default 0.5)")
    parser.add_argument("--max-params", type=float, default=150, help="skip larger models, in millions (default 150)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each model (default 600)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write all rows there")
    options = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS), flush=True)
    rows = []
    for name in options.models or names():
        rows.append(in_process(name, options))
        print(line(rows[-1]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    good = [row for row in rows if "failure" not in row]
    print(f"\n{len(good)} of {len(rows)} cut and proved, {sum(row['exact'] for row in good)} of them exact.")


if __name__ == "__main__":
    main()
