"""The work behind ``attrim search``: the search, then what ``attrim prune`` does with a plan."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import yaml
from torch import nn

from attrim.cli.figures import measure
from attrim.cli.inputs import example, image_shape, pick_device
from attrim.cli.models import build
from attrim.cli.report import draw_run
from attrim.cli.runs import CONFIG_FILE, Run
from attrim.cli.screen import is_main, note, say, show
from attrim.cli.search_progress import SearchProgress
from attrim.cli.search_settings import SearchSettings
from attrim.cli.trace import input_of
from attrim.cli.work import Before, accuracy_on, costs, judge, recover, save_main
from attrim.core.plan import PruningPlan, write_atomic
from attrim.errors import AttrimError, InputError, VerificationError
from attrim.methods.search import SearchResult
from attrim.methods.search import search as look
from attrim.recover import ImageData, open_data
from attrim.recover.data import Split
from attrim.score import CRITERIA
from attrim.search.protocol import Trial
from attrim.search.storage import hide_password
from attrim.ship import load, save
from attrim.ship.store import PLAN_FILE
from attrim.surgery.cut import apply
from attrim.trace.verify import verify

__all__ = ["run_search"]

_AGAIN = ("dense", "trial", "searched", "cut", "recovered", "finetune", "finetuned", "final", "failed")


@dataclass(frozen=True, slots=True, eq=False)
class _Start:
    """What a search starts from."""

    dense: nn.Module
    example: Any
    images: ImageData

    def before(self) -> Before:
        """The same for the steps after the cut."""
        return Before(self.dense, self.example, self.images)


def run_search(settings: SearchSettings, *, resume: bool = False) -> None:
    """Carry out one run of ``attrim search``, go on with it, or take part in one of another machine."""
    budget = settings.budget()
    if settings.data is None:
        raise InputError("a search judges its candidates on images. Add --data PATH.")
    run = Run(settings.out, overwrite=settings.overwrite, resume=resume)
    if resume and run.finished and settings.evaluations <= _asked_before(run):
        say(f"the run in {run.folder} is finished; --evaluations N searches on")
        return
    trained = resume and not run.finished and (run.cut / PLAN_FILE).exists()
    goes_on = resume and (run.folder / CONFIG_FILE).exists()
    start, settings = _prepare(settings)
    if goes_on:
        run.reopen(again=("finetune", "finetuned", "final", "failed") if trained else _AGAIN)
        _write_config(run, settings)
        note(f"going on with the search in {run.folder}")
    else:
        run.start(settings.written())
        run.log("start", attrim=version("attrim"), torch=torch.__version__, device=settings.device)
    try:
        if trained:
            plan, small = PruningPlan.load(run.cut / PLAN_FILE), load(run.cut, model=start.dense)
        else:
            judge(run, "dense", start.dense, start.images)
            plan, small = _cut(run, settings, start, _search(run, settings, start, budget, resume))
        small = recover(run, settings.prune_settings(), start.before(), plan, small)
        save_main(small, plan, run)
        draw_run(plan, run.folder)
        _report(run, start, plan, small)
        run.close()
    except AttrimError as error:
        run.log("failed", error=str(error))
        raise


def _search(run: Run, settings: SearchSettings, start: _Start, budget: Any, resume: bool) -> SearchResult:
    if is_main():  # marks the run as begun, wherever the trials lie
        where = "trials.journal" if settings.storage is None else hide_password(settings.storage)
        write_atomic(run.method / "search.json", json.dumps({"storage": where, "study": settings.study}).encode())
    images, criterion = start.images, CRITERIA.get(settings.criterion)
    options = {"samples": settings.samples} if criterion is not None and criterion.needs_data else {}
    if settings.criterion == "random":
        options["seed"] = settings.seed
    with SearchProgress(settings.evaluations) as progress:

        def on_trial(number: int, trial: Trial, best: Trial | None) -> None:
            progress.trial(best)
            figures = {"value": _finite(trial.value), "best": None if best is None else _finite(best.value)}
            run.log("trial", number=number, **figures, feasible=trial.feasible, kept=list(trial.kept))

        found = look(
            start.dense,
            start.example,
            budget=budget,
            criterion=settings.criterion,
            data=images.batches("train", shuffle=True),
            holdout=images.batches("holdout"),
            augmented=images.batches("train", augment="light", shuffle=True),
            algorithm=settings.algorithm,
            evaluations=settings.evaluations,
            objective=settings.objective,
            seed=settings.seed,
            folder=run.method,
            storage=settings.storage,
            study=settings.study,
            workers=settings.workers,
            resume=resume,
            on_trial=on_trial,
            on_progress=progress.tick,
            start=settings.start,
            settings=settings.setting,
            recalibration=settings.recalibration,
            refit=settings.refit,
            early_stop=settings.early_stop,
            memory=round(settings.memory * (1 << 30)),
            **options,
            **settings.option,
        )
    first = next((trial.value for trial in found.trials if trial.feasible), found.value)
    note(
        f"searched: {found.value:.2%} on held-out rows, best of {len(found.trials)} candidates; the first had {first:.2%}"
    )
    figures = {"value": found.value, "first": _finite(first), "evaluations": len(found.trials), "study": found.study}
    run.log("searched", **figures, seconds=round(found.seconds, 3), groups=list(found.channels.cost.groups))
    return found


def _cut(run: Run, settings: SearchSettings, start: _Start, found: SearchResult) -> tuple[PruningPlan, nn.Module]:
    """The best candidate, proved."""
    small = apply(start.dense, found.plan)
    check = verify(start.dense, small, found.plan, start.example)
    if not check.ok:
        raise VerificationError(
            f"the pruned network is not the masked original: {check}. Freeze the tensors named here with --frozen, and search "
            "again in another folder."
        )
    note(f"verified: {check}")
    before, after = costs(found.plan)
    judge(
        run,
        "cut",
        small,
        start.images,
        macs=[before.macs, after.macs],
        params=[before.params, after.params],
        channels=[before.channels, after.channels],
        verified=check.ok,
        exact=check.exact,
        max_error=check.max_error,
    )
    if settings.finetune_epochs and is_main():
        save(small, found.plan, run.cut)
    return found.plan, small


def _prepare(settings: SearchSettings) -> tuple[_Start, SearchSettings]:
    """Build everything, and write what was found out along the way into the settings."""
    built = build(
        settings.model, weights=settings.weights, pretrained=settings.pretrained, num_classes=settings.num_classes
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
    images = open_data(
        settings.data or "",
        shape=image_shape(resolved.input or ""),
        mean=resolved.mean or built.mean,
        std=resolved.std or built.std,
        batch_size=settings.batch_size,
        limit=settings.limit,
        seed=settings.seed,
        flip=settings.flip,
        randaugment=settings.randaugment,
    )
    return _Start(built.model.to(device), example(resolved.input or "", device), images), resolved


def _report(run: Run, start: _Start, plan: PruningPlan, small: nn.Module) -> None:
    """The final figures; the only place where the test split is read."""
    split: Split = "test" if "test" in start.images.splits else "holdout"
    accuracy = [accuracy_on(model, start.images, split) for model in (start.dense, small)]
    measured = measure(costs(plan), start.dense, small, start.example, accuracy)
    run.log("final", split=split, accuracy=accuracy, **measured.log())
    show(measured.table(f"accuracy on the {split} split"))
    say(f"wrote {run.folder}")


def _asked_before(run: Run) -> int:
    """Evaluations of the run as it was last started."""
    config = yaml.safe_load((run.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return int(config.get("evaluations", 0))


def _write_config(run: Run, settings: SearchSettings) -> None:
    if is_main():
        text = yaml.safe_dump(settings.written(), sort_keys=False, allow_unicode=True)
        write_atomic(run.folder / CONFIG_FILE, text.encode())


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
