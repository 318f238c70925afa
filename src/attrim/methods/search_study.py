"""The study behind a search: its name follows from its settings, and it keeps the scores that the candidates are cut by."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from attrim.core.budget import Budget
from attrim.core.channels import ChannelMap
from attrim.core.scores import Scores
from attrim.errors import CheckpointError
from attrim.search.storage import errors_of, hide_password, open_storage
from attrim.search.trials import Trials

__all__ = ["Study", "identity", "plain"]

_IDENTITY, _CRITERION, _SCORES = "identity", "criterion", "scores:"


def identity(model: nn.Module, channels: ChannelMap, budget: Budget, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the values of the trials, and their order, depend on, as plain values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # a module's extra state
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    limits = {name: value for name, value in dataclasses.asdict(budget).items() if value is not None}
    whole = {
        "network": channels.fingerprint,
        "weights": digest.hexdigest()[:16],
        "budget": limits,
        **{name: plain(value) for name, value in settings.items()},
    }
    read_back: dict[str, Any] = json.loads(json.dumps(whole, default=plain))
    return read_back


class Study:
    """One search in a storage.

    Args:
        where: the storage.
        identity: what the search is.
        name: of the study; None makes one up from the identity, so that the same search finds itself again anywhere.
        resume: whether trials may be there already.
        front: whether the MACs are a second value.

    Raises:
        CheckpointError: trials are there and ``resume`` is False, or they belong to another search.
    """

    def __init__(
        self, where: str, identity: Mapping[str, Any], *, name: str | None, resume: bool, front: bool = False
    ) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.where, self.name = where, name or f"attrim-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.storage = open_storage(where)
        with errors_of(where):
            made = Trials.create(self.storage, self.name, front=front)
            self._id = self.storage.get_study_id_from_name(self.name)
            begun = not made and self.storage.get_n_trials(self._id) > 0
            if begun and not resume:
                raise CheckpointError(
                    f"'{hide_password(where)}' holds this search already (study '{self.name}'). Pass resume=True (--resume) to go on "
                    "with it or to take part in it, or choose another folder, storage or study."
                )
            self._compare(dict(identity))

    def scores(self, compute: Callable[[], Scores]) -> Scores:
        """The scores of this search: those that are kept in the study, else computed now and kept.

        Every process must cut by the same scores, and another machine may compute slightly different ones.
        """
        with errors_of(self.where):
            kept = self._read()
        if kept is None:
            scores = compute()
            with errors_of(self.where):
                kept = self._read()
                if kept is None:
                    self._write(scores)
                    kept = scores
        return kept

    def _compare(self, mine: dict[str, Any]) -> None:
        theirs = self.storage.get_study_user_attrs(self._id).get(_IDENTITY)
        if theirs is None:
            self.storage.set_study_user_attr(self._id, _IDENTITY, mine)
            return
        different = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if different:
            there = ", ".join(f"{key}={theirs.get(key)!r}" for key in different)
            here = ", ".join(f"{key}={mine.get(key)!r}" for key in different)
            raise CheckpointError(
                f"the study '{self.name}' in '{hide_password(self.where)}' is another search: it was made with {there}, found "
                f"{here}. Pass the same model and settings, or choose another study."
            )

    def _read(self) -> Scores | None:
        attrs = self.storage.get_study_user_attrs(self._id)
        if _CRITERION not in attrs:  # written last
            return None
        values = {
            key.removeprefix(_SCORES): torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
            for key, text in attrs.items()
            if key.startswith(_SCORES)
        }
        order = attrs[_CRITERION]["groups"]
        return Scores({group: values[group] for group in order}, attrs[_CRITERION]["name"])

    def _write(self, scores: Scores) -> None:
        for group, values in scores.values.items():
            text = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
            self.storage.set_study_user_attr(self._id, f"{_SCORES}{group}", text)
        note = {"name": scores.criterion, "groups": list(scores.values)}
        self.storage.set_study_user_attr(self._id, _CRITERION, note)


def plain(value: Any) -> Any:
    """``value`` where it can be written down; else a name for it: of a function its own, of scores with a digest."""
    if value is None or isinstance(value, bool | int | float | str | list | tuple | dict):
        return value
    if isinstance(value, Scores):
        digest = hashlib.sha256()
        for group, values in value.values.items():
            digest.update(group.encode() + values.numpy().tobytes())
        return f"{value.criterion}/{digest.hexdigest()[:16]}"
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
