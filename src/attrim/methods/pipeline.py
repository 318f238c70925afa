"""One call from a trained network to a verified, smaller one: trace, score, allocate, apply, verify, recover."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.plan import PruningPlan
from attrim.core.scores import Scores
from attrim.errors import InputError, VerificationError
from attrim.methods.outcome import MethodOutcome
from attrim.methods.scoring import run_method, score
from attrim.methods.table import METHODS
from attrim.modules.repair import Repair
from attrim.recover.evaluate import evaluate
from attrim.recover.finetune import finetune
from attrim.recover.free import free_recovery
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
        channels: the channel map of the original; under ``policy="input_select"`` with groups of what layers read.
        outcome: what a method (``pcas``, …) gave: scores, gates, statistics; None for a criterion.
    """

    model: nn.Module
    plan: PruningPlan
    before: Cost
    after: Cost
    verification: Verification | None
    channels: ChannelMap
    steps: tuple[Mapping[str, Any], ...] = field(default=())
    outcome: MethodOutcome | None = None

    def __str__(self) -> str:
        return f"{self.plan.summary()}\n{'not verified' if self.verification is None else self.verification}"


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    method: Method = "l2",
    budget: Budget | None = None,
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
        method: the name of a criterion or a method (see ``attrim methods``) or a callable ``(model, channels, batches) ->
            Scores``. A method such as ``pcas`` trains its own gates on ``data`` and may train the network before it is cut.
        budget: what may be kept. Some methods take a ratio of their own instead.
        data: batches for what needs them and for recovery: ``(inputs, labels)`` pairs, or inputs alone.
        recover: None; ``"free"`` refits the layers to the original by least squares, without labels or training
            (:func:`attrim.recover.free_recovery`); ``"finetune"`` does the same, then trains on ``data`` with the original
            as teacher (:func:`attrim.recover.finetune`).
        holdout: labelled batches on which every step is judged; they decide nothing here. Without them no accuracy is
            read.
        training: options of the fine-tuning, for example ``{"epochs": 10, "lr": 0.02}``.
        verify: prove the cut before recovery.
        repairs: attribute repairs for your own module types, see :data:`attrim.REPAIRS`.
        options: of the criterion or the method, for example ``reduction="max"``; a method also takes ``loss``, ``seed``,
            ``augmented``, and ``folder`` with ``resume`` for its stages.

    Raises:
        BudgetError, CriterionError, InputError, TraceError: as the single steps do.
        VerificationError: no plan could be proved.

    Example:
        >>> result = attrim.prune(model, torch.randn(1, 3, 32, 32), method="l2", budget=attrim.Budget(macs=0.5))
        >>> result.model, result.after.macs / result.before.macs, result.verification.ok
    """
    _check(recover, data, training)
    analysis = analyse(model, example_inputs)
    made = _cut(model, analysis, method, budget, data, holdout, options, repairs)
    steps: list[Mapping[str, Any]] = []
    note = _Notes(steps, holdout)
    if holdout is not None:
        note("dense", model)
    made.tell(note, model)
    check = None
    if verify:
        check = made.proof(model, analysis, example_inputs)
        if not check.ok:
            steps.append({"step": "rolled back", "reason": str(check)})
            analysis = analyse(model, example_inputs, check=True)
            again = {**options, "folder": str(Path(options["folder"]) / "again")} if options.get("folder") else options
            made = _cut(model, analysis, method, budget, data, holdout, again, repairs)
            check = made.proof(model, analysis, example_inputs)
        if not check.ok:
            raise VerificationError(
                f"the pruned network is not the masked original, so it was thrown away: {check}. Freeze the tensors named "
                "here with Budget(frozen=...), and please report the network."
            )
        steps.append({"step": "verify", "ok": True, "exact": check.exact, "max_error": check.max_error})
    small = made.small
    if recover is not None and data is not None:
        small = free_recovery(
            made.aim, small, made.plan, data, on_step=lambda name, net, figures: note(name, net, **figures)
        )
        if recover == "finetune":
            small = finetune(small, data, **{"teacher": model, **(training or {})})
            note("finetune", small)
    return made.result(small, check, steps)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """A network cut by a plan, and what it was cut from."""

    base: nn.Module
    small: nn.Module
    plan: PruningPlan
    channels: ChannelMap
    outcome: MethodOutcome | None

    @property
    def aim(self) -> nn.Module:
        """What recovery fits the small network to."""
        return self.base if self.outcome is None else self.outcome.aim

    def tell(self, note: _Notes, model: nn.Module) -> None:
        """Write down how the cut came about."""
        if self.outcome is not None:
            note.steps.extend(self.outcome.log)
            if self.base is not model:
                note("trained", self.base)
        note("cut", self.small, criterion=self.plan.provenance["criterion"])

    def result(self, network: nn.Module, check: Verification | None, steps: list[Mapping[str, Any]]) -> PruneResult:
        """Everything together; ``network`` is the recovered one."""
        p = self.plan.provenance
        return PruneResult(
            model=network,
            plan=self.plan,
            before=Cost(p["macs_before"], p["params_before"], p["channels_before"]),
            after=Cost(p["macs_after"], p["params_after"], p["channels_after"]),
            verification=check,
            channels=self.channels,
            steps=tuple(steps),
            outcome=self.outcome,
        )

    def proof(self, model: nn.Module, analysis: Analysis, example_inputs: Any) -> Verification:
        """The cut network against the masked one that it was cut from."""
        known = analysis if self.base is model else None
        return verify_plan(self.base, self.small, self.plan, example_inputs, analysis=known)


def _cut(
    model: nn.Module,
    analysis: Analysis,
    method: Method,
    budget: Budget | None,
    data: Iterable[Any] | None,
    holdout: Iterable[Any] | None,
    options: Mapping[str, Any],
    repairs: Mapping[type[nn.Module], Repair] | None,
) -> _Cut:
    channels = analysis.channel_map()
    if isinstance(method, str) and method in METHODS:
        outcome = run_method(METHODS[method], model, channels, data, budget=budget, holdout=holdout, **options)
        small = apply(outcome.model_to_cut, outcome.plan, repairs=repairs)
        found = channels if outcome.channels is None else outcome.channels
        return _Cut(outcome.model_to_cut, small, outcome.plan, found, outcome)
    if budget is None:
        raise InputError("how small? Pass budget=attrim.Budget(macs=0.5); that keeps half of the multiply-adds.")
    plan = allocate(channels, score(model, channels, method, data, **options), budget)
    return _Cut(model, apply(model, plan, repairs=repairs), plan, channels, None)
