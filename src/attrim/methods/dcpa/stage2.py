"""Stage 2: the derived network trained, from scratch or from what the search has left, with or without a teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attrim.core.plan import PruningPlan
from attrim.errors import InputError
from attrim.methods.dcpa.sample import Draw
from attrim.methods.dcpa.supernet import Supernet
from attrim.modules.batches import Batch, run_batch
from attrim.recover.finetune import finetune
from attrim.recover.recalibrate import recalibrate
from attrim.surgery.cut import apply

__all__ = ["Fixed", "initialised", "remeasured", "train_derived"]


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
    if not limit or not any(isinstance(m, _BatchNorm) and m.track_running_stats for m in base.modules()):
        return base
    fixed = cast(Fixed, recalibrate(Fixed(base, supernet, draw), batches, limit=limit))
    return fixed.base
