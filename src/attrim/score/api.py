"""The door: a name or a callable, checked on the way in and on the way out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from torch import Tensor, nn

from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import CriterionError, InputError
from attrim.score.combine import normalized
from attrim.score.data import require_finite
from attrim.score.gather import tensors_of
from attrim.score.kinds import Missing, Normalize, Reduction
from attrim.score.table import CRITERIA, Criterion

__all__ = ["score"]


def score(
    model: nn.Module,
    channels: ChannelMap,
    criterion: str | Criterion | Callable[..., Scores | Mapping[str, Any]],
    batches: Iterable[Any] | None = None,
    *,
    reduction: Reduction | None = None,
    normalize: Normalize | None = None,
    missing: Missing = "error",
    progress: bool = True,
    criteria: Mapping[str, Criterion] = CRITERIA,
    **options: Any,
) -> Scores:
    """Score every channel of every group; larger means more important. The model is not changed.

    Args:
        model: the traced network.
        channels: its map, from :func:`attrim.trace`.
        criterion: a name (``random l1 l2 lamp fpgm bn_scale taylor hrank obs refit arpruning``), or any callable
            ``(model, channels, batches) -> Scores``; a mapping of group id to vector is accepted as well.
        batches: data for the criteria that need them: any iterable of tensors, ``(inputs, labels)`` pairs, or dicts.
        reduction: how the values of a group's members become one: ``mean sum max min first prod``. Default: the
            criterion's own, mostly the mean.
        normalize: how groups are made comparable: ``none``, ``mean`` (divide by the group's mean), ``max``, ``sum``,
            ``standardize`` (to [0, 1]), ``gaussian`` (zero mean, unit deviation), ``lamp``, ``rank`` (to (0, 1]).
            Default: the criterion's own, mostly the mean; a callable's scores are left alone.
        missing: what to do with groups that the criterion cannot score: ``error``, or ``skip`` (they are left out, and
            :func:`attrim.allocate` keeps them whole).
        progress: show progress when it takes longer than two seconds.
        criteria: the table in which names are looked up.
        options: of the criterion, see its function; for a callable they are handed on.

    Raises:
        CriterionError: unknown name or option, no data where data is needed, NaN weights, groups that cannot be scored,
            or scores of a callable that do not fit the map.

    Example:
        >>> channels = attrim.trace(model, torch.zeros(1, 3, 32, 32))
        >>> attrim.score(model, channels, "l2").values["layer1.0.conv1"].shape
        torch.Size([16])
        >>> attrim.score(model, channels, "taylor", loader, power=1)
        >>> attrim.score(model, channels, lambda model, channels, batches: {g.id: my_scores(g) for g in channels})
    """
    if not isinstance(model, nn.Module) or not isinstance(channels, ChannelMap):
        raise InputError(
            "score expects (model, channels, criterion), an nn.Module and its ChannelMap; found "
            f"{type(model).__name__} and {type(channels).__name__}. channels = attrim.trace(model, example_inputs)."
        )
    if missing not in get_args(Missing):
        raise CriterionError(f"missing: expected error or skip, found {missing!r}.")
    if isinstance(criterion, str):
        criterion = _look_up(criterion, criteria)
    if isinstance(criterion, Criterion):
        return _by_criterion(model, channels, criterion, batches, reduction, normalize, missing, progress, options)
    if not callable(criterion):
        raise CriterionError(
            f"criterion: expected a name ({', '.join(criteria)}) or a callable (model, channels, batches) -> Scores, "
            f"found {type(criterion).__name__}."
        )
    if reduction is not None:
        raise CriterionError(
            "reduction: a callable returns one score per channel, so there is nothing to reduce. Leave it out."
        )
    scores = _as_scores(criterion(model, channels, batches, **options), _name_of(criterion))
    _check_fit(scores, channels)
    return scores if normalize is None else _normalized(scores.values, normalize, scores.criterion)


def _look_up(name: str, criteria: Mapping[str, Criterion]) -> Criterion:
    if name in criteria:
        return criteria[name]
    close = get_close_matches(name.lower(), list(criteria), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise CriterionError(
        f"unknown criterion '{name}'.{hint} The criteria are: {', '.join(criteria)}. Any callable "
        "(model, channels, batches) -> Scores works too."
    )


def _by_criterion(
    model: nn.Module,
    channels: ChannelMap,
    criterion: Criterion,
    batches: Iterable[Any] | None,
    reduction: Reduction | None,
    normalize: Normalize | None,
    missing: Missing,
    progress: bool,
    options: dict[str, Any],
) -> Scores:
    if criterion.needs_data:
        _check_data(criterion, batches)
    known = _options_of(criterion)
    if unknown := sorted(set(options) - known):
        raise CriterionError(
            f"criterion '{criterion.name}' has no option {', '.join(map(repr, unknown))}. "
            f"Its options are: {', '.join(sorted(known)) or 'none'}."
        )
    if criterion.needs_data:
        options["progress"] = progress
        require_finite(model)
    tensors_of(model, channels)
    chosen = criterion.reduction if reduction is None else reduction
    values = criterion.function(model, channels, batches, reduction=chosen, **options) if len(channels) else {}
    _check_missing(criterion, channels, values, missing)
    scores = _normalized(values, criterion.normalize if normalize is None else normalize, criterion.name)
    _check_fit(scores, channels)
    return scores


def _check_data(criterion: Criterion, batches: Any) -> None:
    if batches is None:
        labels = "(inputs, labels) pairs" if criterion.needs_labels else "inputs"
        raise CriterionError(
            f"criterion '{criterion.name}' needs data: an iterable of batches of {labels}. For example "
            f"attrim.score(model, channels, '{criterion.name}', loader)."
        )


def _options_of(criterion: Criterion) -> set[str]:
    parameters = inspect.signature(criterion.function).parameters.values()
    names = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return names - {"reduction", "progress"}


def _check_missing(criterion: Criterion, channels: ChannelMap, values: Mapping[str, Tensor], missing: Missing) -> None:
    absent = [group for group in channels.groups if group not in values]
    if not absent or (missing == "skip" and values):
        return
    shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    skip = "" if len(absent) == len(channels) else ", or pass missing='skip' to leave these groups whole"
    raise CriterionError(
        f"criterion '{criterion.name}' cannot score {len(absent)} of {len(channels)} groups ({shown}): a group needs "
        f"{criterion.requires}. Use criterion 'l2'{skip}."
    )


def _as_scores(result: Any, name: str) -> Scores:
    if isinstance(result, Scores):
        return result
    if isinstance(result, Mapping):
        return Scores(result, name)
    raise CriterionError(
        f"criterion '{name}' returned {type(result).__name__}; expected Scores, or a mapping of group id to one score "
        "per channel: Scores({group.id: vector for group in channels}, 'name')."
    )


def _name_of(criterion: Any) -> str:
    return str(getattr(criterion, "__name__", type(criterion).__name__))


def _check_fit(scores: Scores, channels: ChannelMap) -> None:
    for group, value in scores.values.items():
        if group not in channels.groups:
            raise CriterionError(
                f"criterion '{scores.criterion}' scored '{group}', which is no group of this map. The groups are: "
                f"{', '.join(list(channels.groups)[:8])}, …"
            )
        if len(value) != channels.groups[group].size:
            raise CriterionError(
                f"criterion '{scores.criterion}' gave {len(value)} scores for group '{group}', which has "
                f"{channels.groups[group].size} channels."
            )


def _normalized(values: Mapping[str, Tensor], normalize: str, name: str) -> Scores:
    return Scores({group: normalized(value, normalize) for group, value in values.items()}, name)
