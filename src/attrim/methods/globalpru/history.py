"""Agreement by group and epoch, and the accuracies with masks, read from what a run gives back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from attrim.errors import InputError
from attrim.methods.globalpru.masks import MaskAccuracy

__all__ = ["History", "history"]


@dataclass(frozen=True, slots=True)
class History:
    """How the samples came to agree. Row 0 is right behind the vote, the others follow an epoch of sparse training each.

    Attributes:
        epochs: of each row, counted from the first epoch of the warm-up.
        tau, overlap, variance: group -> a value for each row, see :class:`attrim.methods.globalpru.Agreement`.
        before: accuracies with masks behind the vote; None where there was no holdout.
        after: the same at the end of the sparse training; None where there was none.
    """

    epochs: tuple[int, ...]
    tau: Mapping[str, tuple[float, ...]]
    overlap: Mapping[str, tuple[float, ...]]
    variance: Mapping[str, tuple[float, ...]]
    before: MaskAccuracy | None
    after: MaskAccuracy | None

    def rose(self, what: str = "tau") -> dict[str, bool]:
        """Group -> whether ``tau`` or ``overlap`` is higher in the last row than in the first."""
        return {group: rows[-1] > rows[0] for group, rows in getattr(self, what).items()}


def history(run: Any) -> History:
    """The figures of a run.

    Args:
        run: what :func:`attrim.prune` or :func:`attrim.methods.globalpru.globalpru` gave, or the entries themselves
            (``outcome.statistics["epochs"]``).

    Raises:
        InputError: it is of another method, or agreement was not measured (``monitor=0``).

    Example:
        >>> found = history(attrim.prune(model, example, method="globalpru", budget=budget, data=loader))
        >>> found.tau["layer1.0.conv1"][0], found.tau["layer1.0.conv1"][-1]
    """
    entries = list(_entries(run))
    rows: dict[int, Mapping[str, Any]] = {}
    for entry in entries:
        stage = str(entry.get("stage"))
        if "agreement" in entry and (stage in ("vote-0", "end") or stage.startswith("sparse")):
            rows[int(entry["epoch"])] = entry["agreement"]
    if not rows:
        raise InputError("no agreement was measured in this run. Pass monitor=256, samples to measure it on.")
    masks = {entry["stage"]: _accuracy(entry["masks"]) for entry in entries if "masks" in entry}
    epochs = sorted(rows)
    groups = list(rows[epochs[0]])
    values = {
        name: {group: tuple(float(rows[epoch][group][name]) for epoch in epochs) for group in groups}
        for name in ("tau", "overlap", "variance")
    }
    return History(tuple(epochs), **values, before=masks.get("vote-0"), after=masks.get("end"))


def _entries(run: Any) -> Iterable[Mapping[str, Any]]:
    outcome = getattr(run, "outcome", run)
    statistics = getattr(outcome, "statistics", None)
    if statistics is not None:
        found: Iterable[Mapping[str, Any]] | None = statistics.get("epochs")
        if found is not None and "orders" in statistics:
            return found
    elif isinstance(outcome, (list, tuple)):
        return outcome
    raise InputError(
        f"expected what attrim.prune(method='globalpru') or globalpru gave, found {type(run).__name__} without its entries."
    )


def _accuracy(masks: Mapping[str, float]) -> MaskAccuracy:
    return MaskAccuracy(float(masks["open"]), float(masks["own"]), float(masks["shared"]))
