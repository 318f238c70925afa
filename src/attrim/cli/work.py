"""The work behind ``attrim prune``: one step after the other, each with its line in the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from attrim.cli.figures import measure
from attrim.cli.inputs import example, image_shape, pick_device
from attrim.cli.models import Built, build
from attrim.cli.runs import Run
from attrim.cli.screen import note, say, show
from attrim.cli.settings import PruneSettings
from attrim.cli.trace import input_of
from attrim.core.budget import Budget
from attrim.errors import AttrimError, InputError
from attrim.methods.pipeline import PruneResult, prune
from attrim.recover import ImageData, evaluate, finetune, open_data, recalibrate
from attrim.recover.data import Split
from attrim.score import CRITERIA
from attrim.ship import save

__all__ = ["Before", "recover", "run_prune"]


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """What a run starts from: the trained network, one example, and images if there are any."""

    dense: nn.Module
    example: Any
    images: ImageData | None


def run_prune(settings: PruneSettings) -> None:
    """Carry out one run of ``attrim prune``."""
    budget = settings.budget()
    if settings.data is None and settings.finetune_epochs:
        raise InputError("--finetune-epochs needs images to train on. Add --data PATH.")
    criterion = CRITERIA.get(settings.method)
    if criterion is not None and criterion.needs_data and settings.data is None:
        raise InputError(f"--method {settings.method} reads images. Add --data PATH, or choose one of: {_dataless()}.")
    run = Run(settings.out, overwrite=settings.overwrite)
    start, settings = _prepare(settings)
    run.start(settings.model_dump(mode="json", exclude={"overwrite"}))
    run.log("start", attrim=version("attrim"), torch=torch.__version__, device=settings.device)
    try:
        _work(run, settings, budget, start)
    except AttrimError as error:
        run.log("failed", error=str(error))
        raise


def _work(run: Run, settings: PruneSettings, budget: Budget, start: Before) -> None:
    if start.images is not None:
        _judge(run, "dense", start.dense, start.images)
    begin = time.monotonic()
    result = prune(
        start.dense,
        start.example,
        method=settings.method,
        budget=budget,
        data=None if start.images is None else start.images.batches("train"),
        **_method_options(settings),
    )
    _judge(run, "cut", result.model, start.images, **_cut_figures(result, time.monotonic() - begin))
    small = recover(run, settings, start, result.model)
    save(small, result.plan, run.folder)
    _report(run, start, result, small)


def recover(run: Run, settings: PruneSettings, start: Before, small: nn.Module) -> nn.Module:
    """Recalibrate and fine-tune as the settings say, each step judged on the held-out rows."""
    if start.images is None:
        return small
    augmented = start.images.batches("train", augment=True, shuffle=True)
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in small.modules())
    if settings.recalibrate and has_norm:
        small = recalibrate(small, augmented)
        _judge(run, "recalibrated", small, start.images)
    if settings.finetune_epochs:
        small = finetune(
            small,
            augmented,
            teacher=start.dense if settings.distill else None,
            epochs=settings.finetune_epochs,
            lr=settings.lr,
            optimizer=settings.optimizer,
            seed=settings.seed,
            on_epoch=lambda report: run.log(
                "finetune", **{f"train_{k}" if k == "accuracy" else k: v for k, v in report.items()}
            ),
        )
        _judge(run, "finetuned", small, start.images)
    return small


def _prepare(settings: PruneSettings) -> tuple[Before, PruneSettings]:
    """Build everything, and write what was found out along the way into the settings."""
    built = build(
        settings.model,
        weights=settings.weights,
        pretrained=settings.pretrained,
        num_classes=settings.num_classes,
    )
    if not built.trained:
        note("the weights are random: pass --weights FILE or --pretrained to prune a trained network")
    device = pick_device(settings.device)
    resolved = settings.model_copy(
        update={
            "input": input_of(settings.model, built, settings.input),
            "device": device,
            "mean": settings.mean or built.mean,
            "std": settings.std or built.std,
        }
    )
    torch.manual_seed(settings.seed)
    images = None if settings.data is None else _open(resolved, settings.data, built)
    return Before(built.model.to(device), example(resolved.input or "", device), images), resolved


def _open(settings: PruneSettings, data: str, built: Built) -> ImageData:
    return open_data(
        data,
        shape=image_shape(settings.input or ""),
        mean=settings.mean or built.mean,
        std=settings.std or built.std,
        batch_size=settings.batch_size,
        limit=settings.limit,
        seed=settings.seed,
        flip=settings.flip,
    )


def _method_options(settings: PruneSettings) -> dict[str, Any]:
    criterion = CRITERIA.get(settings.method)
    known: dict[str, Any] = {}
    if criterion is not None and criterion.needs_data:
        known["samples"] = settings.samples
    if settings.method == "random":
        known["seed"] = settings.seed
    return known | settings.option


def _cut_figures(result: PruneResult, seconds: float) -> dict[str, Any]:
    check = result.verification
    note(f"cut in {seconds:.1f} s; verified: {check}")
    return {
        "seconds": round(seconds, 3),
        "macs": [result.before.macs, result.after.macs],
        "params": [result.before.params, result.after.params],
        "channels": [result.before.channels, result.after.channels],
        "verified": None if check is None else check.ok,
        "exact": None if check is None else check.exact,
        "max_error": None if check is None else check.max_error,
    }


def _judge(run: Run, step: str, model: nn.Module, images: ImageData | None, **figures: Any) -> None:
    """Write down a step, with its accuracy on the held-out rows where there are any."""
    accuracy = _accuracy(model, images, "holdout")
    if accuracy is not None:
        figures |= {"accuracy": accuracy, "split": "holdout"}
        note(f"{step}: {accuracy:.2%} on held-out rows")
    run.log(step, **figures)


def _accuracy(model: nn.Module, images: ImageData | None, split: Split) -> float | None:
    if images is None or split not in images.splits:
        return None
    return evaluate(model, images.batches(split))


def _report(run: Run, start: Before, result: PruneResult, small: nn.Module) -> None:
    split: Split = "test" if start.images is not None and "test" in start.images.splits else "holdout"
    accuracy = [_accuracy(model, start.images, split) for model in (start.dense, small)]
    measured = measure(result, start.dense, small, start.example, accuracy)
    run.log("final", split=None if start.images is None else split, accuracy=accuracy, **measured.log())
    title = "" if start.images is None else f"accuracy on the {split} split"
    show(measured.table(title))
    say(f"wrote {run.folder}")


def _dataless() -> str:
    return ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
