"""One call from a trained network to a verified, smaller one: trace, score, allocate, apply, verify, recover."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import InputError, VerificationError
from attrim.modules.repair import Repair
from attrim.recover.evaluate import evaluate
from attrim.recover.finetune import finetune
from attrim.recover.free import free_recovery
from attrim.score.api import score
from attrim.search.allocate import allocate
from attrim.surgery.cut import apply
from attrim.trace.capture import Analysis, analyse
from attrim.trace.verify import Verification
from attrim.trace.verify import verify as verify_plan

__all__ = ["Cost", "PruneResult", "prune"]

Method = str | Callable[[nn.Module, ChannelMap, Iterable[Any] | None], Scores]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs: multiply-adds of the example inputs, parameters, prunable channels."""

    macs: int
    params: int
    channels: int


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What :func:`attrim.prune` returns.

    Attributes:
        model: the smaller network, a new module.
        plan: what was cut.
        before, after: costs.
        verification: the proof, taken before any recovery; None if it was switched off.
        steps: what was done, in order, each with its name and figures; with ``accuracy`` (top-1, on ``holdout``) where
            labels were at hand.
        channels: the channel map of the original.
    """

    model: nn.Module
    plan: PruningPlan
    before: Cost
    after: Cost
    verification: Verification | None
    channels: ChannelMap
    steps: tuple[Mapping[str, Any], ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.plan.summary()}\n{'not verified' if self.verification is None else self.verification}"


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    method: Method = "l2",
    budget: Budget,
    data: Iterable[Any] | None = None,
    recover: Literal["free", "finetune"] | None = None,
    holdout: Iterable[Any] | None = None,
    training: Mapping[str, Any] | None = None,
    verify: bool = True,
    repairs: Mapping[type[nn.Module], Repair] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune ``model`` within ``budget`` and prove that nothing else changed.

    A plan whose verification fails is thrown away: the network is traced again with every group checked in numbers, the
    groups that fail are pinned with the reason, and a new plan is made. If that fails too, nothing is returned.

    Args:
        model: a trained network. Never changed.
        example_inputs: as for :func:`attrim.trace`.
        method: a criterion's name (see ``attrim methods``) or a callable ``(model, channels, batches) -> Scores``.
        budget: what may be kept.
        data: batches for criteria that need them and for recovery: ``(inputs, labels)`` pairs, or inputs alone.
        recover: None; ``"free"`` refits the layers to the original by least squares, without labels or training
            (:func:`attrim.recover.free_recovery`); ``"finetune"`` does the same, then trains on ``data`` with the original
            as teacher (:func:`attrim.recover.finetune`).
        holdout: labelled batches on which every step is judged; they decide nothing here. Without them no accuracy is
            read.
        training: options of the fine-tuning, for example ``{"epochs": 10, "lr": 0.02}``.
        verify: prove the cut before recovery.
        repairs: attribute repairs for your own module types, see :data:`attrim.REPAIRS`.
        options: of the criterion, for example ``reduction="max"``.

    Raises:
        BudgetError, CriterionError, InputError, TraceError: as the single steps do.
        VerificationError: no plan could be proved.

    Example:
        >>> result = attrim.prune(model, torch.randn(1, 3, 32, 32), method="l2", budget=attrim.Budget(macs=0.5))
        >>> result.model, result.after.macs / result.before.macs, result.verification.ok
    """
    _check(recover, data, training)
    analysis = analyse(model, example_inputs)
    small, plan, channels = _cut(model, analysis, method, budget, data, options, repairs)
    steps: list[Mapping[str, Any]] = []
    note = _Notes(steps, holdout)
    if holdout is not None:
        note("dense", model)
    note("cut", small, criterion=plan.provenance["criterion"])
    check = None
    if verify:
        check = verify_plan(model, small, plan, example_inputs, analysis=analysis)
        if not check.ok:
            steps.append({"step": "rolled back", "reason": str(check)})
            analysis = analyse(model, example_inputs, check=True)
            small, plan, channels = _cut(model, analysis, method, budget, data, options, repairs)
            check = verify_plan(model, small, plan, example_inputs, analysis=analysis)
        if not check.ok:
            raise VerificationError(
                f"the pruned network is not the masked original, so it was thrown away: {check}. Freeze the tensors named "
                "here with Budget(frozen=...), and please report the network."
            )
        steps.append({"step": "verify", "ok": True, "exact": check.exact, "max_error": check.max_error})
    if recover is not None and data is not None:
        small = free_recovery(model, small, plan, data, on_step=lambda name, net, figures: note(name, net, **figures))
        if recover == "finetune":
            small = finetune(small, data, **{"teacher": model, **(training or {})})
            note("finetune", small)
    p = plan.provenance
    return PruneResult(
        model=small,
        plan=plan,
        before=Cost(p["macs_before"], p["params_before"], p["channels_before"]),
        after=Cost(p["macs_after"], p["params_after"], p["channels_after"]),
        verification=check,
        channels=channels,
        steps=tuple(steps),
    )


def _check(recover: str | None, data: Any, training: Mapping[str, Any] | None) -> None:
    if recover not in (None, "free", "finetune"):
        raise InputError(f"recover: expected None, 'free' or 'finetune', found {recover!r}.")
    if recover is not None and data is None:
        raise InputError(f"recover={recover!r} needs data. Pass data=loader, batches of (inputs, labels).")
    if recover is not None and isinstance(data, Iterator):
        raise InputError(
            "data: recovery goes through the batches several times, found a generator, which is empty after one pass. "
            "Pass a DataLoader, or list(batches)."
        )
    if training and recover != "finetune":
        raise InputError(f"training={dict(training)!r} needs recover='finetune', found recover={recover!r}.")


@dataclass(frozen=True, slots=True)
class _Notes:
    """Writes steps down, with the accuracy where there are labels."""

    steps: list[Mapping[str, Any]]
    holdout: Iterable[Any] | None

    def __call__(self, step: str, model: nn.Module, **figures: Any) -> None:
        if self.holdout is not None:
            figures["accuracy"] = evaluate(model, self.holdout)
        self.steps.append({"step": step, **figures})


def _cut(
    model: nn.Module,
    analysis: Analysis,
    method: Method,
    budget: Budget,
    data: Iterable[Any] | None,
    options: Mapping[str, Any],
    repairs: Mapping[type[nn.Module], Repair] | None,
) -> tuple[nn.Module, PruningPlan, ChannelMap]:
    channels = analysis.channel_map()
    scores = score(model, channels, method, data, **options)
    plan = allocate(channels, scores, budget)
    return apply(model, plan, repairs=repairs), plan, channels
