"""The two sides that are compared: from a trained network to one with half of its multiply-adds.

Both rank channels by the L2 norm of their filters over the whole network. Each side returns its CPU seconds; what is
not its own work (copying the network for the peer, counting its multiply-adds) is not on its clock.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attrim

__all__ = ["KEEP", "SIDES", "Outcome", "count_macs", "warm_up"]

KEEP = 0.5
PEER_STEPS, PEER_MAX_RATIO = 20, 0.9


@dataclass
class Outcome:
    """What one side did.

    Attributes:
        seconds: CPU seconds by stage.
        kept: fraction of the multiply-adds that is left.
        steps: steps of the peer's schedule, 1 for attrim.
        result: the pruned network.
    """

    seconds: dict[str, float]
    kept: float
    steps: int
    result: nn.Module = field(repr=False)
    plan: attrim.PruningPlan | None = field(default=None, repr=False)

    @property
    def total(self) -> float:
        """CPU seconds of all stages."""
        return sum(self.seconds.values())


class Clock:
    """CPU seconds between calls, by name."""

    def __init__(self) -> None:
        gc.collect()
        self.seconds: dict[str, float] = {}
        self.at = time.process_time()

    def stop(self, stage: str) -> None:
        """The stage that has just ended."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - self.at

    def go(self) -> None:
        """Begin again after work that does not count."""
        self.at = time.process_time()


def count_macs(model: nn.Module, inputs: Tensor) -> int:
    """Multiply-adds by torch's own counter: the same yardstick for both sides."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return int(counter.get_total_flops() // 2)


def ours(model: nn.Module, inputs: Tensor, classifier: str) -> Outcome:
    """trace -> score -> allocate -> apply; the copy that ``apply`` makes is on the clock."""
    whole = count_macs(model, inputs)
    clock = Clock()
    channels = attrim.trace(model, inputs)
    clock.stop("trace")
    clock.go()
    plan = attrim.allocate(channels, attrim.score(model, channels, "l2", progress=False), attrim.Budget(macs=KEEP))
    clock.stop("plan")
    clock.go()
    small = attrim.apply(model, plan)
    clock.stop("apply")
    return Outcome(clock.seconds, count_macs(small, inputs) / whole, 1, small, plan)


def peer(model: nn.Module, inputs: Tensor, classifier: str) -> Outcome:
    """Torch-Pruning 1.6.1 as it is commonly used: a schedule of 20 steps, walked until the target is met."""
    import torch_pruning as tp

    model = copy.deepcopy(model)
    whole = count_macs(model, inputs)
    clock = Clock()
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=PEER_MAX_RATIO,
        iterative_steps=PEER_STEPS,
        ignored_layers=[model.get_submodule(classifier)],
    )
    clock.stop("build")
    macs, steps = whole, 0
    while macs > KEEP * whole and steps < PEER_STEPS:
        clock.go()
        pruner.step()
        clock.stop("steps")
        macs, steps = count_macs(model, inputs), steps + 1
    return Outcome(clock.seconds, macs / whole, steps, model)


SIDES: dict[str, Callable[[nn.Module, Tensor, str], Outcome]] = {"attrim": ours, "Torch-Pruning": peer}


def warm_up(side: str) -> None:
    """One small run, so that neither side pays for modules that are imported on first use."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=attrim.AttrimWarning)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten())
    model.append(nn.Linear(16 * 16, 4))
    SIDES[side](model.eval(), torch.randn(1, 3, 8, 8), "5")
