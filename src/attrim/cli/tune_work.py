"""The work behind ``attrim finetune``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attrim.cli.figures import measure
from attrim.cli.inputs import example, image_shape, pick_device
from attrim.cli.models import Built, build
from attrim.cli.runs import Run
from attrim.cli.screen import note, say, show
from attrim.cli.trace import input_of
from attrim.cli.tune_settings import FinetuneSettings, complete
from attrim.cli.work import accuracy_on, costs, epoch_logger, judge, save_main
from attrim.core.plan import PruningPlan
from attrim.errors import AttrimError
from attrim.recover import ImageData, finetune, open_data
from attrim.recover.data import Split
from attrim.search.decide import plan_from_kept
from attrim.ship import load
from attrim.ship.store import PLAN_FILE
from attrim.trace import trace

__all__ = ["run_finetune"]


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """What the run starts from: the network before any cut, the one to train, its plan, an example, the images."""

    dense: nn.Module
    small: nn.Module
    plan: PruningPlan
    example: Any
    images: ImageData


def run_finetune(settings: FinetuneSettings, *, resume: bool = False) -> None:
    """Carry out one run of ``attrim finetune``, or go on with it."""
    settings.recipe()
    run = Run(settings.out, overwrite=settings.overwrite, resume=resume)
    if resume and run.finished:
        say(f"the run in {run.folder} is finished")
        return
    goes_on = resume and run.unfinished
    start, settings = _prepare(complete(settings))
    if goes_on:
        run.reopen(again=("finetune", "finetuned", "final", "failed"))
        note(f"going on with the run in {run.folder}")
    else:
        run.start(settings.model_dump(mode="json", exclude={"overwrite"}))
        run.log("start", attrim=version("attrim"), torch=torch.__version__, device=settings.device)
    try:
        _work(run, settings, start)
    except AttrimError as error:
        run.log("failed", error=str(error))
        raise


def _work(run: Run, settings: FinetuneSettings, start: Before) -> None:
    images, taught = start.images, settings.teacher == "original"
    if taught and not run.has("dense"):
        judge(run, "dense", start.dense, images)
    if not run.has("before"):
        judge(run, "before", start.small, images)
    tuned = finetune(
        start.small,
        images.batches("train", augment=True, shuffle=True),
        teacher=start.dense if taught else None,
        channels=trace(start.dense, start.example) if settings.attention else None,
        holdout=images.batches("holdout") if "holdout" in images.splits else None,
        folder=run.training,
        resume=True,  # a fresh run's folder was emptied
        on_epoch=epoch_logger(run),
        **settings.recipe(),
    )
    judge(run, "finetuned", tuned, images)
    save_main(tuned, start.plan, run)
    _report(run, start, tuned)
    run.close()


def _prepare(settings: FinetuneSettings) -> tuple[Before, FinetuneSettings]:
    """Build everything, and write what was found out along the way into the settings."""
    name = settings.model or settings.source
    built = build(name, weights=settings.weights, pretrained=settings.pretrained, num_classes=settings.num_classes)
    device = pick_device(settings.device)
    update = {
        "input": input_of(name, built, settings.input),
        "device": device,
        "mean": settings.mean or built.mean,
        "std": settings.std or built.std,
    }
    resolved = settings.model_copy(update=update)
    torch.manual_seed(resolved.seed)
    images = _open(resolved, built)
    dense, inputs = built.model.to(device), example(resolved.input or "", device)
    folder = Path(settings.source)
    if folder.is_dir():
        plan, small = PruningPlan.load(folder / PLAN_FILE), load(folder, model=dense)
    else:
        if not built.trained:
            note("the weights are random: training starts from nothing")
        plan, small = plan_from_kept(trace(dense, inputs), {}, {"criterion": "none: nothing is cut"}), dense
    return Before(dense, small, plan, inputs, images), resolved


def _open(settings: FinetuneSettings, built: Built) -> ImageData:
    return open_data(
        settings.data or "",
        shape=image_shape(settings.input or ""),
        mean=settings.mean or built.mean,
        std=settings.std or built.std,
        batch_size=settings.batch_size,
        limit=settings.limit,
        seed=settings.seed,
        flip=settings.flip,
        randaugment=settings.randaugment,
    )


def _report(run: Run, start: Before, tuned: nn.Module) -> None:
    """The final figures; the only place where the test split is read."""
    split: Split = "test" if "test" in start.images.splits else "holdout"
    cut = start.small is not start.dense
    first, before, after = (accuracy_on(m, start.images, split) for m in (start.dense, start.small, tuned))
    measured = measure(costs(start.plan), start.dense, tuned, start.example, [first, after])
    run.log("final", split=split, accuracy=[first, before, after] if cut else [before, after], **measured.log())
    show(
        measured.table(
            f"accuracy on the {split} split, before the cut and now" if cut else f"accuracy on the {split} split"
        )
    )
    if before is not None and after is not None:
        say(f"{before:.2%} -> {after:.2%} top-1 by fine-tuning ({split} split)")
    say(f"wrote {run.folder}")
