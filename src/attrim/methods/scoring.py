"""The door to scores: criteria by name, methods by name, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import CriterionError
from attrim.methods.outcome import Method, MethodOutcome
from attrim.methods.table import METHODS
from attrim.score.api import score as score_by_criterion
from attrim.score.table import CRITERIA, Criterion

__all__ = ["run_method", "score"]


def score(
    model: nn.Module,
    channels: ChannelMap,
    criterion: str | Criterion | Callable[..., Scores | Mapping[str, Any]],
    batches: Iterable[Any] | None = None,
    **options: Any,
) -> Scores:
    """Score every channel of every group; larger means more important. The model is not changed.

    Args:
        model: the traced network.
        channels: its map, from :func:`attrim.trace`.
        criterion: a criterion's name (``random l1 l2 lamp fpgm bn_scale taylor hrank obs refit``), a method's name (``pcas
            cpsca …``: its attention is trained and read; groups without a gate are absent), or any callable ``(model,
            channels, batches) -> Scores``.
        batches: data, where they are needed: any iterable of tensors, ``(inputs, labels)`` pairs, or dicts.
        options: ``reduction``, ``normalize``, ``missing``, ``progress`` and ``criteria`` as explained in
            :func:`attrim.score.api.score`; all others are the criterion's or the method's own, see ``attrim methods``.

    Raises:
        CriterionError: unknown name or option, no data where data is needed, NaN weights, groups that cannot be scored, or
            scores of a callable that do not fit the map.

    Example:
        >>> channels = attrim.trace(model, torch.zeros(1, 3, 32, 32))
        >>> attrim.score(model, channels, "l2").values["layer1.0.conv1"].shape
        torch.Size([16])
        >>> attrim.score(model, channels, "pcas", loader, epochs=2)
    """
    if not isinstance(criterion, str) or criterion not in METHODS:
        options.setdefault("criteria", _Names(CRITERIA))
        return score_by_criterion(model, channels, criterion, batches, **options)
    method = METHODS[criterion]
    for name in ("reduction", "missing", "progress", "criteria"):
        if name in options and name not in method.options:
            raise CriterionError(f"method '{method.name}' has no option '{name}'. {_known(method)}")
    normalize = options.pop("normalize", None)
    if options.get("end") == "fold":
        raise CriterionError(
            "end='fold' writes attention into the network that is cut, and scores alone cannot. Use attrim.prune, in one round."
        )
    scored = partial(_scores_of, method, options)
    return score_by_criterion(model, channels, scored, batches, normalize=normalize)


def run_method(
    method: Method,
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any] | None,
    *,
    budget: Budget | None,
    **options: Any,
) -> MethodOutcome:
    """Run a method, after a look at its options.

    Raises:
        CriterionError: an unknown option, or no data.
    """
    own = {*method.options, "loss", "folder", "resume", "seed", "holdout", "on_epoch", "augmented"}
    if unknown := sorted(set(options) - own):
        raise CriterionError(f"method '{method.name}' has no option {', '.join(map(repr, unknown))}. {_known(method)}")
    return method.function(model, channels, batches, budget=budget, **options)


def _scores_of(
    method: Method, options: Mapping[str, Any], model: nn.Module, channels: ChannelMap, batches: Iterable[Any] | None
) -> Scores:
    return run_method(method, model, channels, batches, budget=Budget(channels=1.0), **options).scores


def _known(method: Method) -> str:
    return f"Its options are: {', '.join(sorted(method.options))}."


class _Names(dict[str, Criterion]):
    """The criteria, listed with the methods in the message about an unknown name."""

    def __iter__(self) -> Any:
        yield from super().__iter__()
        yield from METHODS
