"""Stage 2: the derived network trained, from scratch or from what the search has left, with or without a teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attrim.core.plan import PruningPlan
from attrim.errors import InputError
from attrim.methods.dcpa.sample import Draw
from attrim.methods.dcpa.supernet import Supernet
from attrim.modules.batches import Batch, batch_source, device_of, read_batch, run_batch
from attrim.modules.distributed import all_sum
from attrim.recover.evaluate import restore_modes
from attrim.recover.finetune import finetune
from attrim.recover.objective import Objective
from attrim.recover.recalibrate import recalibrate
from attrim.recover.recipe import Loss, Recipe
from attrim.surgery.cut import apply

__all__ = ["Fixed", "initialised", "measures", "reference", "remeasured", "train_derived"]

_JUDGED = 16
"""Batches on which two references are compared."""


def train_derived(
    base: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    scratch: bool = True,
    teacher: nn.Module | None = None,
    seed: int = 0,
    **training: Any,
) -> nn.Module:
    """The network that a plan leaves, trained.

    Args:
        base: the network that the plan was made for, with the weights to inherit.
        plan: the derived architecture.
        batches: training data.
        scratch: begin from new weights, as searches of this kind do; else from the inherited ones.
        teacher: the unpruned network; its softened scores become part of the target. What they add is not the search's
            merit: report both.
        seed: of initial weights and training.
        training: settings of :func:`attrim.recover.finetune`; a teacher's usual weight and temperature here are
            ``distill=0.9, temperature=4``.

    Source:
        Dong and Yang, TAS, NeurIPS 2019 (from scratch, with knowledge distillation).

    Example:
        >>> small = train_derived(outcome.model_to_cut, outcome.plan, loader, epochs=300, lr=0.1)
    """
    small = apply(initialised(base, seed) if scratch else base, plan)
    given = {"distill": 0.9, **training} if teacher is not None else training
    return finetune(small, batches, teacher=teacher, seed=seed, **given)


def reference(given: nn.Module, base: nn.Module, batches: Iterable[Any], loss: Loss | None, limit: int) -> nn.Module:
    """The uncut network that recovery without training should aim at: the given one or the searched one, whichever has the
    lower loss in eval mode.

    The searched network has the batch-norm statistics of the derived widths, with which the whole of it computes nonsense;
    so it is measured anew. Trained networks are mostly better as they came, as the search has trained with random widths.

    Args:
        given: as it came.
        base: as the search has left it.
        batches: training data.
        loss: ``(outputs, batch) -> scalar`` instead of cross entropy.
        limit: batches for batch-norm statistics.
    """
    if limit and any(measures(m) for m in base.modules()):
        base = recalibrate(base, batches, limit=limit)
    objective = Objective(Recipe(loss=loss), None)
    sums = torch.zeros(3, dtype=torch.float64)
    for raw in islice(batch_source(batches), _JUDGED):
        batch = read_batch(raw, device_of(given))
        found = [_loss(model, batch, objective) for model in (given, base)]
        sums += batch.size * torch.tensor([*found, 1.0], dtype=torch.float64)
    all_sum(sums)
    return base if sums[1] < sums[0] else given


@torch.no_grad()
def _loss(model: nn.Module, batch: Batch, objective: Objective) -> float:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return float(objective(run_batch(model, batch), None, batch, model, 1.0).data)
    finally:
        restore_modes(modes)


def measures(module: nn.Module) -> bool:
    """Whether a module keeps running statistics that can be measured anew."""
    return isinstance(module, _BatchNorm) and module.track_running_stats


def initialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of ``model`` with new weights, as the modules' own ``reset_parameters`` make them.

    Raises:
        InputError: a parameter belongs to a module that has no such method; build the network anew instead.
    """
    fresh = copy.deepcopy(model)
    made: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, module in fresh.named_modules():
            own = [p for p in module.parameters(recurse=False) if id(p) not in made]
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif own:
                raise InputError(
                    f"'{path}' ({type(module).__name__}) has parameters and no reset_parameters(), so it cannot be "
                    "initialised anew. Build the network anew and apply the plan: attrim.apply(Net(), plan)."
                )
            made |= {id(p) for p in own}
    return fresh


class Fixed(nn.Module):
    """A network that always runs as one of its search space.

    Args:
        base: the network. Held, not copied.
        supernet: made for it.
        draw: what is kept.
    """

    def __init__(self, base: nn.Module, supernet: Supernet, draw: Draw) -> None:
        super().__init__()
        self.base, self.supernet, self.draw = base, supernet, draw.detach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the drawn network; inputs are those of the base."""
        with self.supernet.masked(self.draw):
            return run_batch(self.base, Batch(args, kwargs, None, 0, None))


def remeasured(base: nn.Module, supernet: Supernet, draw: Draw, batches: Iterable[Any], limit: int) -> nn.Module:
    """A copy of ``base`` with the batch-norm statistics of one drawn network, from the first ``limit`` batches.

    Needed before inherited weights are used: during the search every batch was another network.
    """
    if not limit or not any(measures(m) for m in base.modules()):
        return base
    fixed = cast(Fixed, recalibrate(Fixed(base, supernet, draw), batches, limit=limit))
    return fixed.base
