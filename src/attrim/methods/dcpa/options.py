"""What DCP-A can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from attrim.errors import InputError
from attrim.methods.dcpa.attention import Kind
from attrim.methods.dcpa.objective import WEIGHTS, CostRule
from attrim.methods.dcpa.sample import Sampling
from attrim.methods.dcpa.widths import Share
from attrim.modules.gates.places import Policy as Streams
from attrim.recover.recipe import Optimizer, Precision

__all__ = ["DcpaOptions", "Inherit", "Space", "Start"]

Space = Literal["width", "channel"]
Start = Literal["noise", "wide"]
Inherit = Literal["search", "given", "scratch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpaOptions:
    """Options of the search.

    Attributes:
        kind: how the policy's logits come about: ``se`` (free part and attention to the layer's own activations),
            ``xattn`` (attention across layers), ``free`` (no attention: the ablation); ``random`` and ``uniform`` are
            controls, whose policy does not learn while the weights are trained with random widths.
        space: ``width``: one of several widths for each group; ``channel``: a gate for each channel.
        policy: ``internal`` searches what stays inside residual blocks, ``tied`` residual streams as well.
        share: ``group``, or ``block``: the groups of one parent module choose the same ratio.
        drop: whether residual branches may vanish.
        drop_prior: probability in (0, 1) with which each of them is dropped when the policy begins to learn.
        drop_steady: the weights learn without a branch only while it is likelier to go than to stay; otherwise whenever that
            is drawn, as for the policy.
        drop_check: judge the networks with and without the branches that the policy drops on the policy's half of the data,
            and take the better one.
        candidates: candidate widths, as kept fractions in (0, 1]; the whole group is always one.
        order: which channels the narrower widths keep: ``prefix`` (the first), or the name of a criterion that ranks the
            channels of the given network once.
        sampling: ``hard`` (one-hot, straight-through), ``soft``, or ``tas`` (two paths).
        cost, cost_weight: rule and weight of the cost term; None for the weight of the rule's source.
        tolerance: of ``cost="tas"``.
        entropy: weight of the entropy of the choices at the end; it is 0 for the first half of the search.
        epochs: of the search. Each goes once through the half that teaches the weights. 0 trains nothing.
        warmup: share of the epochs in which only the weights learn, with uniformly random widths.
        lr, optimizer, momentum, weight_decay, lr_warmup, clip: of the weights; the rate falls to zero on a cosine.
        policy_lr, policy_decay: of the policy's Adam, whose betas are (0.5, 0.999).
        tau_high, tau_low: temperatures at the beginning and the end.
        reduction: of ``se``: hidden units are ``max(C // reduction, 4)``.
        balanced: what attention adds to a logit is divided by the number of its inputs, so that ``se`` and ``xattn`` move
            logits no faster than ``free`` does at the same ``policy_lr``.
        start: initial logits: ``noise`` around 0, or ``wide``, leaning to the whole width.
        fine: meet the budget within 1 % by widths between the candidates where these are too far apart.
        weights: what is cut: the network as the ``search`` has trained it, the one ``given``, or one initialised anew
            (``scratch``), to be trained afterwards.
        recalibrate: batches for measuring batch-norm statistics of the derived network before it is cut; 0 for none.
        precision: of forward passes: ``no``, ``bf16``, ``fp16``.
        every_minutes: time between checkpoints within an epoch.
    """

    kind: Kind = "se"
    space: Space = "width"
    policy: Streams = "internal"
    share: Share = "group"
    drop: bool = True
    drop_prior: float = 0.02
    drop_steady: bool = True
    drop_check: bool = True
    candidates: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    order: str = "l2"
    sampling: Sampling = "hard"
    cost: CostRule = "abslog"
    cost_weight: float | None = None
    tolerance: float = 0.05
    entropy: float = 0.0
    epochs: int = 15
    warmup: float = 0.1
    lr: float = 0.02
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_warmup: float = 0.0
    clip: float | None = None
    policy_lr: float = 3e-3
    policy_decay: float = 1e-3
    tau_high: float = 5.0
    tau_low: float = 0.1
    reduction: int = 16
    balanced: bool = False
    start: Start = "noise"
    fine: bool = True
    weights: Inherit = "search"
    recalibrate: int = 100
    precision: Precision = "no"
    every_minutes: float | None = None

    @property
    def strength(self) -> float:
        """Weight of the cost term."""
        return WEIGHTS[self.cost] if self.cost_weight is None else self.cost_weight

    @property
    def warm_epochs(self) -> int:
        """Epochs before the policy learns; all of them for a control, and never all of them otherwise."""
        if self.kind in ("random", "uniform"):
            return self.epochs
        return min(round(self.warmup * self.epochs), max(0, self.epochs - 1))

    def check(self) -> None:
        """Refuse what is out of its range.

        Raises:
            InputError: the option is named, with what was expected and found.
        """
        for name, known in (
            ("kind", get_args(Kind)), ("space", get_args(Space)), ("share", get_args(Share)),
            ("sampling", get_args(Sampling)), ("cost", get_args(CostRule)), ("start", get_args(Start)),
            ("weights", get_args(Inherit)), ("policy", ("internal", "tied")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}.")
        for name, least in (("epochs", 0), ("reduction", 1), ("recalibrate", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: expected an int >= {least}, found {value!r}.")
        for name, low, high in (
            ("cost_weight", 0, math.inf), ("tolerance", 0, 1), ("entropy", 0, math.inf), ("warmup", 0, 1),
            ("policy_decay", 0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (_number(value) and low <= value <= high and value < math.inf):
                raise InputError(f"{name}: expected a number in [{low}, {high}], found {value!r}.")
        if not (_number(self.drop_prior) and 0 < self.drop_prior < 1):
            raise InputError(f"drop_prior: expected a probability in (0, 1), found {self.drop_prior!r}.")
        for name in ("policy_lr", "tau_low", "tau_high"):
            if not (_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf):
                raise InputError(f"{name}: expected a number > 0, found {getattr(self, name)!r}.")
        if self.tau_low > self.tau_high:
            raise InputError(f"tau_low: expected at most tau_high={self.tau_high}, found {self.tau_low!r}.")
        if self.space == "channel" and (self.sampling == "tas" or self.share == "block" or self.kind == "uniform"):
            raise InputError(
                "space='channel' decides channels one by one, which does not go together with sampling='tas', share='block' "
                "or kind='uniform'. Use space='width'."
            )
        if not isinstance(self.candidates, list | tuple) or not self.candidates:
            raise InputError(
                f"candidates: expected kept fractions such as (0.25, 0.5, 1.0), found {self.candidates!r}."
            )

    def identity(self) -> dict[str, Any]:
        """What the search depends on; ``drop_check``, ``fine``, ``weights`` and ``recalibrate`` come after it."""
        after = {"drop_check", "fine", "weights", "recalibrate", "every_minutes"}
        return {k: list(v) if k == "candidates" else v for k, v in asdict(self).items() if k not in after}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
