"""Training of gates, alone or with their network, and reading them, as stages that are finished once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import CriterionError
from attrim.methods.attention import AttentionStatistics, read_attention
from attrim.methods.stages import Stages
from attrim.modules.batches import batch_source
from attrim.modules.distributed import rank, share, world
from attrim.modules.gates import Gated, Gates
from attrim.modules.names import named_tensors
from attrim.recover.checkpoint import Checkpoints
from attrim.recover.finetune import finetune
from attrim.recover.recipe import Loss

__all__ = [
    "Shaping",
    "attention_note",
    "check_data",
    "first_batch",
    "gate_notes",
    "plain_settings",
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


def trained_gates(
    model: nn.Module,
    gates: Gates,
    batches: Iterable[Any],
    stages: Stages,
    *,
    frozen: bool,
    loss: Loss | None,
    seed: int,
    holdout: Iterable[Any] | None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None,
    regularizer: Shaping | None,
    description: str,
    **training: Any,
) -> tuple[nn.Module, Gates, list[Mapping[str, Any]]]:
    """Train ``gates`` on a copy of ``model``, or read what a finished stage ``gates`` has left.

    Args:
        model: not changed.
        gates: not changed.
        batches: gone through once an epoch.
        stages: where the result is kept, and checkpoints of the training until then.
        frozen: whether the base stays as it is: neither a weight nor a running statistic changes.
        loss, seed, holdout, on_epoch: as for :func:`attrim.recover.finetune`.
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
    else:

        def note(report: Mapping[str, Any]) -> None:
            reports.append(report)
            if on_epoch is not None:
                on_epoch(report)

        folder = stages.path("training")
        gated = finetune(  # type: ignore[assignment]
            gated,
            batches,
            loss=loss,
            regularizer=regularizer,
            holdout=holdout,
            seed=seed,
            folder=folder,
            resume=folder is not None,
            on_epoch=note,
            description=description,
            **training,
        )
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


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as values that JSON holds; functions are known by their name."""
    plain = (bool, int, float, str, type(None))
    return {
        k: v if isinstance(v, plain) else getattr(v, "__qualname__", type(v).__qualname__) for k, v in settings.items()
    }


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
