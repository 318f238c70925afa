"""The two steps of the search: one teaches the weights, one the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from attrim.methods.dcpa.objective import cost_term, entropy
from attrim.methods.dcpa.options import DcpaOptions
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.sample import Draw
from attrim.methods.dcpa.supernet import Supernet
from attrim.methods.dcpa.watch import Watched
from attrim.modules.batches import run_batch
from attrim.recover.engine import Engine
from attrim.recover.feed import Portion
from attrim.recover.metrics import class_hits
from attrim.recover.objective import Objective

__all__ = ["Figures", "PolicyStep", "WeightStep"]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one batch, over all processes: means over its samples, their number, right answers, how many could be judged."""

    values: dict[str, float]
    samples: float
    right: float
    judged: float


class WeightStep:
    """Gradients of the task's loss for the weights of one drawn network, and a look at the layers' activations.

    Args:
        base: the user's network.
        call: the same as the engine prepared it.
        supernet, policy, watched: of the search.
        objective: the loss.
        engine: where it happens.
    """

    def __init__(
        self, base: nn.Module, call: nn.Module, supernet: Supernet, policy: Policy, watched: Watched, objective: Objective,
        engine: Engine,
    ) -> None:  # fmt: skip
        self.base, self.call, self.supernet, self.policy = base, call, supernet, policy
        self.watched, self.objective, self.engine = watched, objective, engine

    def __call__(self, portion: Portion, draw: Draw, progressed: float) -> Figures:
        """Leave gradients in the weights, and the descriptor in the policy."""
        with self.supernet.masked(draw.detach()):
            self.watched.active = True
            outputs = self.call(portion.batch)
            self.watched.active = False
            loss = self.objective(outputs, None, portion.batch, self.base, progressed).data
            self.engine.backward(_share(loss, portion, self.engine))
        means = self.watched.take().to(self.engine.device)
        self.policy.observe(self.engine.total(means) / self.engine.world)
        return _figures({"loss": loss}, outputs, portion, self.engine)


class PolicyStep:
    """Gradients of the task's loss, the cost term and the entropy for the policy; the weights have none.

    Batches are normalised by their own statistics, as in training, but leave no trace in the running ones.

    Args:
        base: the user's network.
        supernet, policy: of the search.
        objective: the loss of the task.
        options: rule, weight and tolerance of the cost term; how to sample.
        engine: where it happens.
    """

    def __init__(
        self,
        base: nn.Module,
        supernet: Supernet,
        policy: Policy,
        objective: Objective,
        options: DcpaOptions,
        engine: Engine,
    ) -> None:
        self.base, self.supernet, self.policy = base, supernet, policy
        self.objective, self.options, self.engine = objective, options, engine

    def __call__(self, portion: Portion, draw: Draw, entropy_weight: float, progressed: float) -> Figures:
        """Leave gradients in the policy, the same in every process."""
        options, policy = self.options, self.policy
        with _still(self.base):
            with self.supernet.masked(draw), self.engine.autocast():
                outputs = run_batch(self.base, portion.batch)
            outputs = _in_full(outputs)
            loss = self.objective(outputs, None, portion.batch, self.base, progressed).data
            prices = policy.prices
            cost = cost_term(
                options.cost, policy.expected(), policy.likeliest(), prices.bounds, prices.whole, options.tolerance
            ).to(loss.dtype)
            spread = entropy(policy.log_probabilities()) if policy.space.units else loss.detach() * 0
            whole = _share(loss, portion, self.engine) + options.strength * cost + entropy_weight * spread
            policy.zero_grad(set_to_none=True)
            self.engine.backward(whole)
        self._together()
        return _figures({"loss": loss, "cost": cost, "entropy": spread}, outputs, portion, self.engine)

    def _together(self) -> None:
        """Gradients averaged over processes, and no longer scaled."""
        scaler = self.engine.scaler()
        factor = 1.0 if scaler is None else 1.0 / float(scaler.get_scale())
        for p in self.policy.parameters():
            if p.grad is not None:
                p.grad = self.engine.total(p.grad.contiguous()) * (factor / self.engine.world)
                if scaler is not None and not bool(p.grad.isfinite().all()):
                    p.grad.zero_()


@contextmanager
def _still(base: nn.Module) -> Iterator[None]:
    """Inside, weights take no gradients and running statistics do not move."""
    learning = [p for p in base.parameters() if p.requires_grad]
    norms = [m for m in base.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    try:
        for p in learning:
            p.requires_grad_(False)
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for norm in norms:
            norm.track_running_stats = True


def _in_full(outputs: Any) -> Any:
    """Scores in float32, where autocast made them shorter."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16):
        return outputs.float()
    if isinstance(outputs, tuple) and not hasattr(outputs, "_fields"):
        return tuple(_in_full(o) for o in outputs)
    return outputs


def _share(loss: Tensor, portion: Portion, engine: Engine) -> Tensor:
    """Processes count by their rows, then their gradients are averaged."""
    if engine.world == 1:
        return loss
    whole = engine.total(torch.tensor([float(portion.size)], device=engine.device))
    return loss * (portion.size * engine.world / float(whole))


def _figures(values: dict[str, Tensor], outputs: Any, portion: Portion, engine: Engine) -> Figures:
    size = float(portion.size)
    right, judged = class_hits(outputs, portion.batch.labels)
    means = torch.stack([v.detach().double() for v in values.values()]) * size
    counts = torch.tensor([judged if size else 0, size], dtype=torch.float64, device=means.device)
    hits = right.to(means).reshape(1) * float(size > 0)
    *sums, found, counted, samples = engine.total(torch.cat([means, hits, counts])).tolist()
    return Figures({n: v / samples for n, v in zip(values, sums, strict=True)}, samples, found, counted)
