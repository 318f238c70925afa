"""Training of gates, alone or with their network, and reading them, as stages that are finished once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from attrim.errors import CriterionError
from attrim.methods.attention import AttentionStatistics, read_attention
from attrim.methods.stages import Stages
from attrim.modules.batches import batch_source, device_of
from attrim.modules.distributed import rank, share, world
from attrim.modules.gates import Gated, Gates
from attrim.modules.names import named_tensors
from attrim.recover.checkpoint import Checkpoints
from attrim.recover.engine import make_engine
from attrim.recover.finetune import finetune
from attrim.recover.keeper import weights_digest
from attrim.recover.recipe import Loss

__all__ = [
    "GateRun",
    "Shaping",
    "attention_note",
    "begin_together",
    "check_data",
    "first_batch",
    "gate_notes",
    "read_once",
    "trained_gates",
]


class Shaping:
    """What is added to the task's loss while gates learn: ``penalty · mean attention``; and the softmax's rising sharpness.

    Args:
        penalty: weight of the mean attention over places, samples and channels; 0 for none.
        sharpness: factor of the logits at the end of the training; it rises from 1 on a straight line.
    """

    def __init__(self, penalty: float, sharpness: float) -> None:
        self.penalty, self.sharpness = penalty, sharpness
        self.__qualname__ = f"Shaping(penalty={penalty}, sharpness={sharpness})"

    def __call__(self, model: nn.Module, progress: float) -> Tensor:
        """The term, for the regularizer of :func:`attrim.recover.finetune`."""
        if not isinstance(model, Gated) or model.collected is None:
            return torch.zeros(())
        model.gates.sharpen(1 + (self.sharpness - 1) * progress)
        values = [a.mean() for found in model.collected.attention.values() for a in found]
        return self.penalty * torch.stack(values).mean()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateRun:
    """How a method's own training runs.

    Attributes:
        loss: ``(outputs, batch) -> scalar`` instead of cross entropy.
        folder: checkpoints of the training, the trained gates and the statistics are kept there. None keeps nothing.
        resume: go on with the run in ``folder``; finished stages are read.
        seed: of the gates' weights and the training.
        holdout: labelled batches whose accuracy is reported after every epoch; they decide nothing.
        on_epoch: called with the figures of every epoch of the training.
        augmented: batches to train on, instead of those that statistics are read from.
    """

    loss: Loss | None
    folder: str | Path | None
    resume: bool
    seed: int
    holdout: Iterable[Any] | None
    on_epoch: Callable[[Mapping[str, Any]], None] | None
    augmented: Iterable[Any] | None

    def stages(self, method: str, model: nn.Module, settings: Mapping[str, Any]) -> Stages:
        """The run's stages on disk, for one method, network and settings.

        Raises:
            CheckpointError: the folder holds another run, or one that was not asked for.
        """
        loss = None if self.loss is None else getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        mine = {"method": method, "weights": weights_digest(model), "seed": self.seed, "loss": loss, **settings}
        return Stages(self.folder, mine, self.resume)


def trained_gates(
    model: nn.Module,
    gates: Gates,
    batches: Iterable[Any],
    stages: Stages,
    run: GateRun,
    *,
    frozen: bool,
    regularizer: Shaping | None,
    description: str,
    **training: Any,
) -> tuple[nn.Module, Gates, list[Mapping[str, Any]]]:
    """Train ``gates`` on a copy of ``model``, or read what a finished stage ``gates`` has left.

    Args:
        model: not changed.
        gates: not changed.
        batches: gone through once an epoch, unless the run names others.
        stages: where the result is kept, and checkpoints of the training until then.
        run: loss, seed and what is reported.
        frozen: whether the base stays as it is: neither a weight nor a running statistic changes.
        regularizer: an additional term.
        description: for the progress bar.
        training: further settings of :func:`attrim.recover.finetune`.

    Returns:
        The base (``model`` itself when frozen), the trained gates, and the figures of each epoch (none when read).
    """
    gated = Gated(copy.deepcopy(model), gates, frozen=frozen)
    reports: list[Mapping[str, Any]] = []
    if stages.has("gates"):
        _fill(gated, stages.read("gates"))
        return (model if frozen else gated.base), gated.gates, reports

    def note(report: Mapping[str, Any]) -> None:
        reports.append(report)
        if run.on_epoch is not None:
            run.on_epoch(report)

    folder = stages.path("training")
    given: dict[str, Any] = {
        "loss": run.loss,
        "holdout": run.holdout,
        "seed": run.seed,
        "on_epoch": note,
        "regularizer": regularizer,
    }
    source = batches if run.augmented is None else run.augmented
    tuned = finetune(
        gated, source, folder=folder, resume=folder is not None, description=description, **given, **training
    )
    gated = cast(Gated, tuned)
    trained = {f"gates.{k}": v for k, v in gated.gates.state_dict().items()}
    if not frozen:
        trained |= {f"base.{k}": v for k, v in named_tensors(gated.base).tensors.items()}
    stages.write("gates", trained)
    if folder is not None and rank() == 0:
        Checkpoints(folder).remove()
    return (model if frozen else gated.base), gated.gates, reports


def _fill(gated: Gated, tensors: Mapping[str, Tensor]) -> None:
    gated.gates.load_state_dict({k.removeprefix("gates."): v for k, v in tensors.items() if k.startswith("gates.")})
    own = named_tensors(gated.base).tensors
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("base."):
                own[name.removeprefix("base.")].copy_(tensor)


def check_data(name: str, batches: Iterable[Any] | None) -> Iterable[Any]:
    """The batches, if they can be gone through more than once.

    Raises:
        CriterionError: there are none, or they are a generator.
    """
    if batches is None:
        raise CriterionError(
            f"method '{name}' trains gates on data, and there is none. Pass data=loader, batches of (inputs, labels)."
        )
    if isinstance(batches, Iterator):
        raise CriterionError(
            f"method '{name}' goes through the batches several times, found a generator, which is empty after one pass. Pass a "
            "DataLoader, or list(batches)."
        )
    return batch_source(batches)


def begin_together(stages: Stages, model: nn.Module) -> None:
    """Begin a run once every process has looked into its folder: the first one to write would be an earlier run to others."""
    engine = make_engine(device_of(model), "no")
    try:
        engine.gather(0)
        stages.begin()
    finally:
        engine.close()


def first_batch(batches: Iterable[Any]) -> Any:
    """The first batch, on which the network is watched.

    Raises:
        CriterionError: there is none.
    """
    for batch in islice(batches, 1):
        return batch
    raise CriterionError("the data hold no batch, so there is nothing to learn from.")


def read_once(
    stages: Stages, model: nn.Module, gates: Gates, batches: Iterable[Any], samples: int | None
) -> AttentionStatistics:
    """The statistics, from the finished stage ``attention`` or from one pass over the data."""
    path = stages.path("attention.safetensors")
    if path is not None and path.is_file():
        return AttentionStatistics.load(path)
    own = None if samples is None else -(-samples // world())
    statistics = read_attention(model, gates, share(batches) if world() > 1 else batches, samples=own)
    if path is not None and rank() == 0:
        statistics.save(path)
    return statistics


def gate_notes(gates: Gates, reports: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lines for the log: what was gated, and every epoch of the training."""
    number = sum(p.numel() for p in gates.parameters())
    refused = {"refused": dict(gates.refused)} if gates.refused else {}
    return [
        {"step": "gates", "groups": len(gates.places), "parameters": number, **refused},
        *({"step": "gate training", **report} for report in reports),
    ]


def attention_note(statistics: AttentionStatistics) -> Mapping[str, Any]:
    """A line for the log: what was read."""
    dead = sum(int((~alive).all(0).sum()) for alive in statistics.alive.values())
    means = torch.cat([mean.reshape(-1) for mean in statistics.mean.values()])
    return {
        "step": "attention",
        "samples": statistics.samples,
        "dead": dead,
        "mean": float(means.mean()),
        "smallest": float(means.min()),
        "largest": float(means.max()),
    }
