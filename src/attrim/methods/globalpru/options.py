"""What GlobalPru can be told, and what of it does not go together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from attrim.errors import InputError
from attrim.methods.globalpru.losses import Form, Ranking
from attrim.methods.globalpru.scores import Alloc, Ranked, Reader
from attrim.methods.globalpru.vote import Ballot
from attrim.modules.gates.places import Point, Policy
from attrim.recover.recipe import Optimizer, Recipe

__all__ = ["Attention", "End", "GlobalPruOptions"]

Attention = Literal["se", "eca", "fbs"]
End = Literal["fold", "drop"]

_STRENGTH = {"pairwise": 1.0, "listwise": 0.3, "hinge": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPruOptions:
    """What GlobalPru can be told.

    Attributes:
        ratio: fraction of the channels that goes, in [0, 1), instead of limits in the budget.
        alloc: ``uniform`` keeps the same fraction of every group; ``attention`` sets one threshold over the mean attention
            of all groups, relative to each group's mean.
        vote: ``pairwise`` (Copeland), ``position``, ``topk``, ``borda``; for comparison ``mean`` (attention, no vote) and
            ``random``. See :class:`attrim.methods.globalpru.vote.Votes`.
        revote_every: vote again after so many epochs, in the first half of the sparse training, what was counted before
            weighing half; 0 votes once.
        attention: the gate: ``se``, ``eca`` or ``fbs``.
        policy: ``internal`` gates what stays inside residual blocks; ``tied`` residual streams as well, every branch voting.
        tap: where gates hang: ``post`` (behind the activation), ``pre`` (behind the norm) or ``conv``.
        shared: one gate for all branches of a stream.
        hidden: width inside a gate; None for ``max(8, size // 16)``.
        ranked: what is voted by and ranked: ``logits`` or ``attention``; None takes the attention of ``fbs``, whose logits
            are cut off at zero, and the logits of the others.
        form: of the ranking loss: ``pairwise`` (logistic), ``listwise`` (ListMLE), ``hinge``.
        strength: weight of the ranking loss; 0 for none; None for 1, with ``listwise`` 0.3.
        omega: how much more a pair across the cut weighs, with ``pairwise``.
        temperature: of ``pairwise`` and ``listwise``; None for 1, with attention 0.1.
        margin: of ``hinge``.
        pairs: how many are drawn in a step where a group has more than 128 channels.
        ramp: share of the sparse training in which the ranking loss rises to its full weight, in [0, 1].
        sparsity: weight of the mean attention of the channels that are to go.
        warmup_epochs, warmup_lr: of the training of gates and network before the vote.
        epochs, lr: of the sparse training; 0 epochs leave it out.
        optimizer, momentum, weight_decay: of both.
        samples: vote, and read the attention, with so many samples; None takes all.
        monitor: samples on which agreement is measured after every epoch of the sparse training; 0 for none.
        end: ``fold`` the mean attention into the weights that are then cut, or ``drop`` the gates.
    """

    ratio: float | None
    alloc: Alloc
    vote: Ballot
    revote_every: int
    attention: Attention
    policy: Policy
    tap: Point
    shared: bool
    hidden: int | None
    ranked: Ranked | None
    form: Form
    strength: float | None
    omega: float
    temperature: float | None
    margin: float
    pairs: int
    ramp: float
    sparsity: float
    warmup_epochs: int
    warmup_lr: float
    epochs: int
    lr: float
    optimizer: Optimizer
    momentum: float
    weight_decay: float
    samples: int | None
    monitor: int
    end: End

    @property
    def reader(self) -> Reader:
        """What is ranked."""
        return Reader(self.ranked or ("attention" if self.attention == "fbs" else "logits"))

    @property
    def ranking(self) -> Ranking:
        """The ranking loss."""
        softness = (
            self.temperature if self.temperature is not None else 0.1 if self.reader.ranked == "attention" else 1.0
        )
        return Ranking(form=self.form, temperature=softness, omega=self.omega, margin=self.margin, pairs=self.pairs)

    @property
    def weight(self) -> float:
        """Of the ranking loss."""
        return _STRENGTH[self.form] if self.strength is None else self.strength

    @property
    def training(self) -> dict[str, Any]:
        """Settings that both trainings share."""
        return {name: getattr(self, name) for name in ("optimizer", "momentum", "weight_decay")}

    @property
    def parts(self) -> list[int]:
        """Epochs of the sparse training between votes."""
        every = self.revote_every
        votes = self.epochs // 2 // every if every else 0
        lengths = [every] * votes + [self.epochs - votes * every]
        return [length for length in lengths if length]

    def check(self) -> None:
        """Refuse what is out of its range.

        Raises:
            InputError: the option is named, with what was expected and found.
        """
        for name, known in (
            ("alloc", get_args(Alloc)),
            ("vote", get_args(Ballot)),
            ("attention", get_args(Attention)),
            ("ranked", (*get_args(Ranked), None)),
            ("end", get_args(End)),
        ):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise InputError(f"{name}: expected one of {', '.join(map(str, known))}, found {found!r}.")
        if self.policy == "input_select":
            raise InputError(
                "policy: expected 'internal' or 'tied', found 'input_select': the sparse training shrinks channels, not what "
                "single layers read of them. Use method='pcas' for that."
            )
        for name, least in (("warmup_epochs", 1), ("epochs", 0), ("revote_every", 0), ("monitor", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}: expected an int >= {least}, found {value!r}.")
        if self.revote_every > self.epochs // 2:
            raise InputError(
                f"revote_every: votes are held in the first half of the {self.epochs} epochs of sparse training, so expected at "
                f"most {self.epochs // 2}, found {self.revote_every}."
            )
        if self.samples is not None and (
            isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1
        ):
            raise InputError(f"samples: expected an int >= 1, or None for all, found {self.samples!r}.")
        for name in ("warmup_lr", "lr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"{name}: expected a number > 0, found {value!r}.")
        Recipe(epochs=1, lr=self.lr, **self.training).check(None)
        for name, most in (("strength", float("inf")), ("sparsity", float("inf")), ("ramp", 1.0)):
            value = getattr(self, name)
            if value is None and name == "strength":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= most or value == float("inf"):
                limit = f"in [0, {most:g}]" if most < float("inf") else ">= 0"
                raise InputError(f"{name}: expected a number {limit}, found {value!r}.")
        _ = self.ranking  # looks at the rest

    def identity(self) -> dict[str, Any]:
        """What the trained network depends on; ``end`` comes after it, ``monitor`` only watches."""
        return {k: v for k, v in asdict(self).items() if k not in ("end", "monitor")}
