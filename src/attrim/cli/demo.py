"""``attrim demo``: the whole way in a minute, on handwritten digits, without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from attrim.cli import options
from attrim.cli.demo_net import DigitNet
from attrim.cli.figures import measure
from attrim.cli.report import draw_run
from attrim.cli.runs import Run
from attrim.cli.screen import note, say, show
from attrim.core.budget import Budget
from attrim.core.plan import PruningPlan
from attrim.errors import InputError, MissingDependencyError, VerificationError
from attrim.methods.pipeline import PruneResult
from attrim.methods.pipeline import prune as cut
from attrim.methods.table import METHODS
from attrim.recover import evaluate, finetune, free_recovery
from attrim.recover.data import Split
from attrim.recover.tensors import TensorBatches
from attrim.score import CRITERIA
from attrim.ship import load, save
from attrim.ship.timing import cpu_threads

__all__ = ["demo"]

SIDE = 16
TEST_ROWS, HELD_ROWS = 360, 180


@dataclass(frozen=True, slots=True)
class Digits:
    """Handwritten digits, always split alike: 1257 for training, 180 held out to judge the steps, 360 to test."""

    train: tuple[Tensor, Tensor]
    holdout: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batches(self, split: Split, *, augment: bool = False, seed: int = 0) -> TensorBatches:
        """Batches of 64 images of 16 x 16; augmenting shifts them by a pixel."""
        images, labels = {"train": self.train, "holdout": self.holdout, "test": self.test}[split]
        return TensorBatches(
            images,
            labels,
            mean=(0.3,),
            std=(0.35,),
            batch_size=64,
            size=(SIDE, SIDE),
            crop=1 if augment else 0,
            shuffle=augment,
            seed=seed,
        )


def demo(
    method: Annotated[str, typer.Option(metavar="NAME", help="How channels are scored; see attrim methods.")] = "l2",
    keep_macs: Annotated[float, typer.Option(metavar="F", help="Fraction of the MACs that stays.")] = 0.5,
    epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of the first training.")] = 12,
    finetune_epochs: Annotated[int, typer.Option(metavar="N", help="Epochs after the cut.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything that is random.")] = 0,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for the result; an earlier one is replaced.")
    ] = "runs/demo",
    debug: options.Debug = False,
) -> None:
    """Train a small residual network on scikit-learn's digits, prune it to half, recover, verify, save and reload it.

    Runs on the processor and downloads nothing.

    **Examples**

    ```
    attrim demo
    attrim demo --method taylor --keep-macs 0.3
    ```
    """
    if epochs < 1 or finetune_epochs < 1:
        raise InputError(f"--epochs and --finetune-epochs: expected at least 1, found {epochs} and {finetune_epochs}.")
    budget = Budget(macs=keep_macs)
    settings = {"method": method, "keep_macs": keep_macs, "epochs": epochs, "finetune_epochs": finetune_epochs}
    if method not in CRITERIA and method not in METHODS:
        raise InputError(f"--method: expected one of {', '.join((*CRITERIA, *METHODS))}, found '{method}'.")
    digits = load_digits()
    run = Run(out, overwrite=True)
    run.start({"demo": True, **settings, "seed": seed})
    with cpu_threads(1):  # layers this small lose more by waiting for each other, and one thread repeats on any machine
        dense = _train(run, digits, epochs, seed)
        data = digits.batches("train")
        result = cut(
            dense, torch.zeros(1, 1, SIDE, SIDE), method=method, budget=budget, data=data, **_options(method, seed, run)
        )
        for line in () if result.outcome is None else result.outcome.log:
            run.log(**line)
        kept = result.after.macs / result.before.macs
        note(f"2. cut with {method} to {kept:.1%} of the MACs; {result.verification}")
        _judge(run, "cut", result.model, digits)
        small = _recover(run, digits, dense, result.model, result.plan, finetune_epochs, seed)
        save(small, result.plan, run.folder)
        draw_run(result.plan, run.folder)
        _conclude(run, digits, result, dense, small)


def load_digits() -> Digits:
    """The 1797 digits that scikit-learn ships, split once and for all.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "demo", "the demo") from error
    raw = bundled()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images = torch.from_numpy((raw.images[order] * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(raw.target[order].astype(np.int64))
    sizes = [TEST_ROWS, HELD_ROWS, len(order) - TEST_ROWS - HELD_ROWS]
    test, holdout, train = zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)
    return Digits(train, holdout, test)


def _train(run: Run, digits: Digits, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    fresh = DigitNet().eval()
    batches = digits.batches("train", augment=True, seed=seed)
    dense = finetune(
        fresh,
        batches,
        epochs=epochs,
        lr=0.1,
        warmup=0.1,
        seed=seed,
        on_epoch=_logger(run, "train"),
        description="training",
    )
    note(f"1. trained for {_epochs(epochs)} on {len(digits.train[1])} digits")
    _judge(run, "dense", dense, digits)
    return dense


def _recover(
    run: Run, digits: Digits, dense: nn.Module, small: nn.Module, plan: PruningPlan, epochs: int, seed: int
) -> nn.Module:
    batches = digits.batches("train", augment=True, seed=seed + 1)
    small = free_recovery(dense, small, plan, batches)
    note("3. refitted every layer to the original, without labels")
    _judge(run, "recovered", small, digits)
    small = finetune(
        small, batches, teacher=dense, epochs=epochs, lr=0.03, seed=seed, on_epoch=_logger(run, "finetune")
    )
    note(f"4. fine-tuned for {_epochs(epochs)}, with the original as teacher")
    _judge(run, "finetuned", small, digits)
    return small


def _conclude(run: Run, digits: Digits, result: PruneResult, dense: nn.Module, small: nn.Module) -> None:
    """Reload what was saved, compare, and show the final figures of the reloaded network."""
    again = load(run.folder, model=DigitNet().eval())
    images = next(iter(digits.batches("test")))[0]
    if not _same_outputs(small, again, images):
        raise VerificationError(
            f"the network reloaded from {run.folder} gives other outputs than the one that was saved."
        )
    say(f"saved to {run.folder}, reloaded into a fresh DigitNet: outputs equal bit by bit")
    accuracy = [evaluate(model, digits.batches("test")) for model in (dense, again)]
    measured = measure((result.before, result.after), dense, again, images, accuracy)
    run.log("final", split="test", accuracy=accuracy, reloaded_equal=True, **measured.log())
    show(measured.table(f"handwritten digits, {TEST_ROWS} test images; latency of {len(images)} images"))


def _logger(run: Run, step: str) -> Any:
    def log(report: Mapping[str, float]) -> None:
        run.log(step, **{f"train_{name}" if name == "accuracy" else name: value for name, value in report.items()})

    return log


def _judge(run: Run, step: str, model: nn.Module, digits: Digits) -> None:
    accuracy = evaluate(model, digits.batches("holdout"))
    run.log(step, accuracy=accuracy, split="holdout")
    note(f"   {accuracy:.2%} right on held-out digits")


@torch.no_grad()
def _same_outputs(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    return torch.equal(one.eval()(images), other.eval()(images))


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _options(method: str, seed: int, run: Run) -> dict[str, Any]:
    if method in METHODS:
        return {"seed": seed, "folder": run.method}
    return {"seed": seed} if method == "random" else {}
