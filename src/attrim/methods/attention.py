"""Statistics of attention over a data set: read in one pass, summed for each sample, in float64, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.plan import write_atomic
from attrim.errors import CheckpointError
from attrim.modules.batches import logits_of
from attrim.modules.distributed import all_sum
from attrim.modules.gates import Collected, Gates
from attrim.modules.gates.places import Place
from attrim.score.data import forward, stream, undisturbed

__all__ = ["AttentionStatistics", "read_attention"]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionStatistics:
    """Attention of every gate, over the samples; ``P`` is the number of places of a group.

    Attributes:
        mean: group -> ``(P, size)`` float64: mean attention.
        second: group -> ``(P, size)``: mean of its square.
        alive: group -> ``(P, size)`` bool: whether the channel's activation at the gate was ever anything but zero.
        samples: how many were read.
        by_class: group -> ``(classes, P, size)``: mean over the samples of a class (NaN for a class without samples);
            empty where the batches hold no class labels.
        class_counts: ``(classes,)`` samples of each class, or None.
    """

    mean: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    alive: Mapping[str, Tensor]
    samples: int
    by_class: Mapping[str, Tensor]
    class_counts: Tensor | None

    def score(self, reduction: str = "mean") -> dict[str, Tensor]:
        """Group -> ``(size,)``: mean (or ``max``) over its places of the mean attention; zero at a place where it is dead."""
        values = {group: torch.where(self.alive[group], mean, 0.0) for group, mean in self.mean.items()}
        return {group: v.amax(0) if reduction == "max" else v.mean(0) for group, v in values.items()}

    def factors(self) -> dict[str, Tensor]:
        """Group -> ``(size,)``: mean attention over samples and places, for folding."""
        return {group: mean.mean(0) for group, mean in self.mean.items()}

    def deviation(self) -> dict[str, Tensor]:
        """Group -> ``(P, size)``: standard deviation over the samples."""
        return {g: (self.second[g] - mean.square()).clamp_min(0).sqrt() for g, mean in self.mean.items()}

    def save(self, path: Any) -> None:
        """Write them as safetensors."""
        from safetensors.torch import save

        tensors = {f"{what}/{g}": v.contiguous() for what in _FIELDS for g, v in getattr(self, what).items()}
        if self.class_counts is not None:
            tensors["class_counts"] = self.class_counts
        write_atomic(path, save(tensors, {"samples": str(self.samples)}))

    @classmethod
    def load(cls, path: Any) -> AttentionStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        found: dict[str, dict[str, Tensor]] = {what: {} for what in _FIELDS}
        try:
            with safe_open(path, framework="pt") as file:
                samples = int(file.metadata()["samples"])
                names = set(file.keys())
                for name in sorted(names - {"class_counts"}):
                    what, _, group = name.partition("/")
                    found[what][group] = file.get_tensor(name)
                counts = file.get_tensor("class_counts") if "class_counts" in names else None
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the attention statistics in '{path}' cannot be read: {error}. Delete them."
            ) from error
        return cls(samples=samples, class_counts=counts, **found)


_FIELDS = ("mean", "second", "alive", "by_class")


def read_attention(
    model: nn.Module,
    gates: Gates,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    name: str = "attention",
    progress: bool = True,
) -> AttentionStatistics:
    """Go through the data once with gates attached, everything in eval mode and without gradients.

    Under ``torch.distributed`` every process gives its own share of the batches, and all get the sums over all of them.

    Args:
        model: the network. Not changed.
        gates: made for it.
        batches: training images without augmentation.
        samples: stop after the batch that reaches this many; None reads all.
        name: for progress and messages.
        progress: show progress when it takes longer than two seconds.

    Raises:
        CriterionError: no sample. DataError: the model does not take the batches.
    """
    sums = _Sums(gates)
    with undisturbed(model), torch.no_grad(), gates.attached(model, watch=sums.watch, inplace=True) as collected:
        for batch in stream(model, batches, name, samples=samples, show=progress):
            outputs = forward(model, batch)
            sums.add(collected, batch.size, batch.labels, lambda found=outputs: _classes(found))  # type: ignore[misc]
    return sums.result()


def _classes(outputs: Any) -> int:
    scores = logits_of(outputs)
    return scores.shape[1] if scores.ndim == 2 else 0


class _Sums:
    """Running sums over all places side by side."""

    def __init__(self, gates: Gates) -> None:
        self.keys = [(group, place.source) for group, places in gates.places.items() for place in places]
        self.widths = [len(place.index) for places in gates.places.values() for place in places]
        self.first = self.second = torch.zeros(sum(self.widths), dtype=torch.float64)
        self.classes: Tensor | None = None
        self.counts: Tensor | None = None
        self.samples = 0
        self.suspects: dict[tuple[str, str], Tensor] = {}
        self.labelled = True

    def add(self, collected: Collected, size: int, labels: Any, classes: Callable[[], int]) -> None:
        """One batch."""
        found: dict[tuple[str, str], list[Tensor]] = {}
        for group, values in collected.attention.items():
            for place, value in zip(collected.places[group], values, strict=True):
                found.setdefault((group, place.source), []).append(_per_sample(value, size))
        rows = [
            (torch.stack(found[key]).mean(0) if len(found[key]) > 1 else found[key][0]) if key in found else None
            for key in self.keys
        ]
        like = next(row for row in rows if row is not None)
        whole = torch.cat(
            [like.new_ones(size, w) if row is None else row for row, w in zip(rows, self.widths, strict=True)], 1
        ).double()
        self.first = self.first.to(whole.device) + whole.sum(0)
        self.second = self.second.to(whole.device) + whole.square().sum(0)
        self.samples += size
        self._by_class(whole, labels, classes)

    def _by_class(self, whole: Tensor, labels: Any, classes: Callable[[], int]) -> None:
        usable = isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) == len(whole)
        if not usable or labels.is_floating_point():
            self.labelled = False
        if not self.labelled:
            return
        if self.classes is None or self.counts is None:
            number = classes()
            self.classes, self.counts = whole.new_zeros(number, whole.shape[1]), whole.new_zeros(number)
        if not len(self.counts) or int(labels.max()) >= len(self.counts) or int(labels.min()) < 0:
            self.labelled = False
            return
        self.classes.index_add_(0, labels, whole)
        self.counts.index_add_(0, labels, whole.new_ones(len(labels)))

    def watch(self, place: Place, x: Tensor) -> None:
        """Look for channels that have been zero so far; after the first batch these are few, mostly none."""
        key = (place.group, place.source)
        left = self.suspects.get(key)
        if left is not None and not len(left):
            return
        index = torch.as_tensor(place.index, device=x.device)
        left = torch.arange(len(index), device=x.device) if left is None else left
        whole = place.in_order and len(left) == x.shape[place.dim]
        part = x if whole else x.index_select(place.dim, index[left].reshape(-1))
        axes = [d for d in range(x.ndim) if d != place.dim]
        largest = part.amax(axes)
        rectified = place.reading is not None and place.reading.rectified
        if not rectified:
            largest = torch.maximum(largest, -part.amin(axes))
        self.suspects[key] = left[largest.reshape(len(left), -1).amax(1) <= 0]

    def result(self) -> AttentionStatistics:
        """Sums over all processes, divided."""
        device = self.first.device
        flags = [torch.ones(width, dtype=torch.float64, device=device) for width in self.widths]
        for key, flag in zip(self.keys, flags, strict=True):
            flag[self.suspects.get(key, flag.new_empty(0, dtype=torch.long))] = 0  # what never ran tells nothing
        alive = torch.cat(flags)
        totals = torch.tensor([self.samples, not self.labelled], dtype=torch.float64, device=device)
        all_sum(self.first, self.second, alive, totals)
        samples = int(totals[0])
        by_class, counts = {}, None
        if not totals[1] and self.classes is not None and self.counts is not None:
            all_sum(self.classes, self.counts)
            counts = self.counts.cpu()
            by_class = self._split(self.classes / self.counts[:, None])
        return AttentionStatistics(
            mean=self._split(self.first / samples),
            second=self._split(self.second / samples),
            alive=self._split(alive > 0),
            samples=samples,
            by_class=by_class,
            class_counts=counts,
        )

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        """Group -> ``(..., P, size)``."""
        parts: dict[str, list[Tensor]] = {}
        for (group, _), part in zip(self.keys, torch.split(values.cpu(), self.widths, -1), strict=True):
            parts.setdefault(group, []).append(part)
        return {group: torch.stack(found, -2) for group, found in parts.items()}


def _per_sample(value: Tensor, size: int) -> Tensor:
    """Rows of a sample together (windows of an image), averaged."""
    if len(value) == size or len(value) % size:
        return value
    return value.reshape(size, -1, value.shape[1]).mean(1)
