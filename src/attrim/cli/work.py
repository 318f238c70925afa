"""The work behind ``attrim prune``: one step after the other, each with its line in the metrics, each resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from attrim.cli.figures import measure
from attrim.cli.inputs import example, image_shape, pick_device
from attrim.cli.method_work import AGAIN, base_is_needed, in_method, method_options, plain_batches, sized_by_option
from attrim.cli.models import Built, build
from attrim.cli.report import draw_run
from attrim.cli.runs import Run
from attrim.cli.screen import is_main, note, say, show
from attrim.cli.settings import PruneSettings
from attrim.cli.trace import input_of
from attrim.core.budget import Budget
from attrim.core.plan import PruningPlan
from attrim.errors import AttrimError, InputError
from attrim.methods.pipeline import Cost, PruneResult, prune
from attrim.methods.rounds import prune_rounds
from attrim.methods.table import METHODS
from attrim.recover import ImageData, evaluate, finetune, free_recovery, open_data, recalibrate
from attrim.recover.data import Split
from attrim.score import CRITERIA
from attrim.ship import load, save
from attrim.ship.store import PLAN_FILE

__all__ = ["Before", "accuracy_on", "costs", "epoch_logger", "judge", "recover", "run_prune", "save_main"]


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """What a run starts from: the trained network, one example, and images if there are any."""

    dense: nn.Module
    example: Any
    images: ImageData | None


def run_prune(settings: PruneSettings, *, resume: bool = False) -> None:
    """Carry out one run of ``attrim prune``, or go on with it."""
    budget = None if sized_by_option(settings) else settings.budget()
    if settings.rounds > 1 and budget is None:
        raise InputError(
            "--rounds needs a size that holds for the original: --keep-macs, --keep-params or --keep-channels."
        )
    if settings.data is None and settings.finetune_epochs:
        raise InputError("--finetune-epochs needs images to train on. Add --data PATH.")
    known = CRITERIA.get(settings.method) or METHODS.get(settings.method)
    if known is not None and known.needs_data and settings.data is None:
        raise InputError(f"--method {settings.method} reads images. Add --data PATH, or choose one of: {_dataless()}.")
    run = Run(settings.out, overwrite=settings.overwrite, resume=resume)
    if resume and run.finished:
        say(f"the run in {run.folder} is finished")
        return
    goes_on = resume and (run.cut / PLAN_FILE).exists() and not base_is_needed(settings, run)
    in_rounds = resume and not goes_on and run.rounds.is_dir()
    begun = in_rounds
    start, settings = _prepare(settings)
    if goes_on:
        run.reopen(again=("finetune", "finetuned", "final", "failed"))
        note(f"going on with the run in {run.folder}")
    elif in_rounds:
        run.reopen(again=("dense", "cut", "failed"))
        note(f"going on with the rounds in {run.folder}")
    elif begun := resume and in_method(settings, run):
        run.reopen(again=AGAIN)
        note(f"going on with {settings.method} in {run.folder}")
    else:
        run.start(settings.model_dump(mode="json", exclude={"overwrite"}))
        run.log("start", attrim=version("attrim"), torch=torch.__version__, device=settings.device)
    try:
        if goes_on:
            base, (plan, small) = start.dense, _read_cut(run, start)
        else:
            base, plan, small = _cut(run, settings, budget, start, resume=begun)
        small = recover(run, settings, replace(start, dense=base), plan, small)
        save_main(small, plan, run)
        draw_run(plan, run.folder)
        _report(run, start, plan, small)
        run.close()
    except AttrimError as error:
        run.log("failed", error=str(error))
        raise


def _cut(
    run: Run, settings: PruneSettings, budget: Budget | None, start: Before, *, resume: bool
) -> tuple[nn.Module, PruningPlan, nn.Module]:
    """What to recover towards (the network, or what a method has made of it), the plan, and the smaller network."""
    if start.images is not None:
        judge(run, "dense", start.dense, start.images)
    begin = time.monotonic()
    result = _pruned(run, settings, budget, start, resume)
    outcome = result.outcome
    for line in () if outcome is None else outcome.log:
        if line["step"] != "gate training":
            run.log(**line)
    judge(run, "cut", result.model, start.images, **_cut_figures(result, time.monotonic() - begin))
    if settings.finetune_epochs:
        _keep_cut(run, result.model, result.plan)
    return start.dense if outcome is None else outcome.aim, result.plan, result.model


def _pruned(run: Run, settings: PruneSettings, budget: Budget | None, start: Before, resume: bool) -> PruneResult:
    """The cut, at once or in rounds with a recovery after each."""
    options: dict[str, Any] = {"method": settings.method, "budget": budget, **_method_options(settings)}
    images = start.images
    if settings.method in METHODS:
        options |= method_options(settings, run, images, resume)
    if settings.rounds == 1:
        data = None if images is None else images.batches("train")
        return prune(start.dense, start.example, data=data, **options)
    return prune_rounds(
        start.dense,
        start.example,
        rounds=settings.rounds,
        data=_round_batches(settings, images),
        recover="free" if settings.recover == "free" and images is not None else None,
        folder=run.rounds,
        resume=resume,
        seed=settings.seed,
        on_round=lambda number, result: note(
            f"round {number} of {settings.rounds}: {result.after.macs / result.before.macs:.1%} of its MACs left"
        ),
        **options,
    )


def _round_batches(settings: PruneSettings, images: ImageData | None) -> Any:
    """A method reads attention from plain images and trains on augmented ones; all else sees augmented ones."""
    if images is None or settings.method in METHODS:
        return plain_batches(images)
    return images.batches("train", augment="light", shuffle=True)


def _keep_cut(run: Run, small: nn.Module, plan: PruningPlan) -> None:
    """The verified network lies safe before anything is trained."""
    if is_main():
        save(small, plan, run.cut)


def _read_cut(run: Run, start: Before) -> tuple[PruningPlan, nn.Module]:
    return PruningPlan.load(run.cut / PLAN_FILE), load(run.cut, model=start.dense)


def recover(run: Run, settings: PruneSettings, start: Before, plan: PruningPlan, small: nn.Module) -> nn.Module:
    """Recover without training and fine-tune as the settings say, each step judged on the held-out rows."""
    if start.images is None:
        return small
    augmented = start.images.batches("train", augment=True, shuffle=True)
    light = start.images.batches("train", augment="light", shuffle=True)
    if settings.recover != "none" and not run.has("recovered"):
        torch.manual_seed(settings.seed)
        if settings.recover == "free":
            small = free_recovery(start.dense, small, plan, light, on_step=_step_logger(run))
        else:
            small = recalibrate(small, light)
        if settings.finetune_epochs:
            _keep_cut(run, small, plan)
        judge(run, "recovered", small, start.images, how=settings.recover)
    if settings.finetune_epochs:
        small = finetune(
            small,
            augmented,
            teacher=start.dense if settings.distill else None,
            epochs=settings.finetune_epochs,
            lr=settings.lr,
            optimizer=settings.optimizer,
            seed=settings.seed,
            folder=run.training,
            resume=True,  # a fresh run's folder was emptied
            on_epoch=epoch_logger(run),
        )
        judge(run, "finetuned", small, start.images)
    return small


def _step_logger(run: Run) -> Callable[[str, nn.Module, Mapping[str, Any]], None]:
    """Writes the steps of the recovery without training into the metrics."""

    def log(step: str, model: nn.Module, figures: Mapping[str, Any]) -> None:
        del model
        run.log(step, **figures)

    return log


def epoch_logger(run: Run) -> Callable[[Mapping[str, Any]], None]:
    """Writes the figures of an epoch into the metrics of the run; its accuracy is one on training images."""

    def log(report: Mapping[str, Any]) -> None:
        run.log("finetune", **{f"train_{k}" if k == "accuracy" else k: v for k, v in report.items()})

    return log


def save_main(small: nn.Module, plan: PruningPlan, run: Run) -> None:
    """Write the result, in the main process."""
    if is_main():
        save(small, plan, run.folder)


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
        randaugment=settings.randaugment,
    )


def _method_options(settings: PruneSettings) -> dict[str, Any]:
    criterion = CRITERIA.get(settings.method)
    known: dict[str, Any] = {}
    if criterion is not None and criterion.needs_data:
        known["samples"] = settings.samples
    if settings.method == "random" and settings.rounds == 1:  # rounds hand every round a seed of its own
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


def judge(run: Run, step: str, model: nn.Module, images: ImageData | None, **figures: Any) -> None:
    """Write down a step, with its accuracy on the held-out rows where there are any."""
    accuracy = accuracy_on(model, images, "holdout")
    if accuracy is not None:
        figures |= {"accuracy": accuracy, "split": "holdout"}
        note(f"{step}: {accuracy:.2%} on held-out rows")
    run.log(step, **figures)


def accuracy_on(model: nn.Module, images: ImageData | None, split: Split) -> float | None:
    if images is None or split not in images.splits:
        return None
    return evaluate(model, images.batches(split))


def _report(run: Run, start: Before, plan: PruningPlan, small: nn.Module) -> None:
    split: Split = "test" if start.images is not None and "test" in start.images.splits else "holdout"
    accuracy = [accuracy_on(model, start.images, split) for model in (start.dense, small)]
    measured = measure(costs(plan), start.dense, small, start.example, accuracy)
    run.log("final", split=None if start.images is None else split, accuracy=accuracy, **measured.log())
    title = "" if start.images is None else f"accuracy on the {split} split"
    show(measured.table(title))
    say(f"wrote {run.folder}")


def costs(plan: PruningPlan) -> tuple[Cost, Cost]:
    """What the network costs before and after a plan."""
    p = plan.provenance
    before, after = (Cost(p[f"macs_{at}"], p[f"params_{at}"], p[f"channels_{at}"]) for at in ("before", "after"))
    return before, after


def _dataless() -> str:
    return ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
