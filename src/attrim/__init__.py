"""attrim: attention-guided channel pruning for PyTorch. The public names, nothing else."""

from __future__ import annotations

from attrim import errors, recover
from attrim.core.axes import Axis
from attrim.core.branches import Branch
from attrim.core.budget import Budget
from attrim.core.channels import ChannelGroup, ChannelMap, Member, PinnedAxis, Tap
from attrim.core.cost import CostModel
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import AttrimError, AttrimWarning
from attrim.methods.pipeline import PruneResult, prune
from attrim.methods.rounds import prune_rounds
from attrim.methods.scoring import score
from attrim.methods.search import SearchResult, search
from attrim.modules.repair import REPAIRS
from attrim.search.allocate import allocate
from attrim.search.decide import plan_from_kept
from attrim.ship.store import load, save
from attrim.surgery.cut import apply
from attrim.surgery.optimizer import carry_optimizer
from attrim.trace import trace
from attrim.trace.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "REPAIRS",
    "AttrimError",
    "AttrimWarning",
    "Axis",
    "Branch",
    "Budget",
    "ChannelGroup",
    "ChannelMap",
    "CostModel",
    "Member",
    "PinnedAxis",
    "PruneResult",
    "PruningPlan",
    "Scores",
    "SearchResult",
    "Tap",
    "Verification",
    "__version__",
    "allocate",
    "apply",
    "carry_optimizer",
    "errors",
    "load",
    "plan_from_kept",
    "prune",
    "prune_rounds",
    "recover",
    "save",
    "score",
    "search",
    "trace",
    "verify",
]
