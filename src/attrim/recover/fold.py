"""Bias folding: what a removed channel gives on average goes into the constants of those that read it."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attrim.core.plan import PruningPlan
from attrim.errors import AttrimWarning, DataError, InputError
from attrim.modules.batches import Batch, batch_source, device_of, read_batch, to_device
from attrim.modules.course.contractions import Contraction, ContractionWatch
from attrim.modules.course.follow import Arrival, Follow, Site
from attrim.modules.course.survey import Course, Survey, Unit
from attrim.modules.distributed import all_sum
from attrim.modules.names import named_tensors
from attrim.modules.progress import progress
from attrim.recover.refit.networks import check_networks, evaluating
from attrim.recover.refit.normal import NormalWatch
from attrim.recover.refit.survivors import kept_inputs, kept_outputs
from attrim.recover.refit.write import add_constant
from attrim.score.data import forward, undisturbed

__all__ = ["fold_bias"]

_Place: TypeAlias = tuple[str, int]
"""A weight, and where in its storage the part of a call begins."""


def fold_bias(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    samples: int | None = 1024,
) -> nn.Module:
    """A copy of ``pruned`` in which the mean of each removed channel is in the constants of its consumers.

    What a consumer has lost on average, ``Σ W[:, removed] · mean``, is added to its bias, or taken off the running mean
    of the batch norm that follows it. A channel that is constant is so removed without any loss, except at the borders
    of a zero-padded convolution: the mean is taken over all output positions, border and interior together. Without
    padding, and with 1x1 kernels, it is exact.

    With ``batches`` the means are measured in the dense network, in eval mode, streaming: one batch is held at a time,
    and one float64 number for each input and kernel tap of each consumer. Without, they follow from batch norm: where a
    consumer reads an elementwise function of a batch norm's output, that output is taken as normal with the batch norm's
    bias and weight as mean and standard deviation; concatenations, flattening and average pooling in between are
    followed.

    Of a residual branch that the plan drops nothing is folded.

    Call it right after the cut. A recalibrated batch norm has made good the same loss already and folding would make it
    good twice; recalibrating or reconstructing afterwards is fine and leaves nothing of it.

    Args:
        dense: the original. Not changed.
        pruned: ``attrim.apply(dense, plan)``. Not changed.
        plan: what was cut.
        batches: inputs like those of training; labels are ignored. Under ``torch.distributed`` every process gives its
            own share, and all get the same result.
        example_inputs: needed without ``batches``: a tensor, a tuple, or a dict of keyword inputs. Only shapes matter.
        samples: stop after the batch that reaches this many; None takes them all.

    Returns:
        A new module with the modes of ``pruned``.

    Raises:
        PlanError: the networks do not belong to the plan.
        DataError: no sample, or the model does not take the batches.
        InputError: neither batches nor example inputs, or ``samples`` below 1.

    Warns:
        AttrimWarning: consumers of removed channels that stay as they are, each with the reason: no place for a
            constant, no batch norm that tells the mean, or a weight that runs several times.

    Source:
        Ye et al., "Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning of Convolution Layers",
        ICLR 2018, section 4 (constant channels go into the next layer's bias or running mean); for the data-free means
        see :class:`attrim.recover.refit.normal.NormalWatch`.

    Example:
        >>> small = attrim.apply(model, plan)
        >>> small = attrim.recover.fold_bias(model, small, plan, train_batches)
        >>> small = attrim.recover.fold_bias(model, small, plan, example_inputs=torch.zeros(1, 3, 32, 32))
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples: expected an int >= 1 or None, found {samples!r}.")
    check_networks(dense, pruned, plan)
    if batches is None and example_inputs is None:
        raise InputError(
            "fold_bias needs batches to measure means on, or, to take them from batch-norm statistics, example_inputs "
            "(only shapes matter): fold_bias(dense, pruned, plan, example_inputs=torch.zeros(1, 3, 224, 224))."
        )
    with torch.inference_mode(False):  # tensors that can be written to
        small = copy.deepcopy(pruned)
    with undisturbed(dense), evaluating(small), torch.no_grad():
        if batches is None:
            example = _example(example_inputs, device_of(dense))
            losses = _Losses.prepare(dense, plan, example)
            with NormalWatch(dense, losses.weights, losses.add):
                forward(dense, example)
            unread = "its inputs are no elementwise function of a batch norm's output; pass batches to measure them"
        else:
            example, losses = _measure(dense, plan, batches, samples)
            unread = "it was not reached"
        _write(small, example, losses, unread)
    return small


@dataclass(slots=True, eq=False)
class _Sum:
    """Sum of what a consumer reads, over samples and output positions: ``(blocks, columns, taps)``, float64."""

    use: Contraction
    total: Tensor
    count: Tensor


@dataclass(slots=True, eq=False)
class _Losses:
    """What consumers of removed channels lose.

    Attributes:
        plan: what was cut.
        shapes: of the dense tensors.
        units: the consumers that can be seen.
        refused: weight of other consumers -> why.
        weights: name -> weight of the consumers.
        sums: what they read.
    """

    plan: PruningPlan
    shapes: Mapping[str, tuple[int, ...]]
    units: Mapping[_Place, Unit]
    refused: dict[str, str]
    weights: Mapping[str, Tensor]
    sums: dict[_Place, _Sum]

    @classmethod
    def prepare(cls, dense: nn.Module, plan: PruningPlan, example: Batch) -> _Losses:
        named = named_tensors(dense)
        cut = {name: tuple(c.keep) for name, c in plan.cuts.items() if name in named.parameters}
        course = _survey(dense, example, cut)
        units = {(u.key[0], u.offset): u for u in course.units if u.dim in cut.get(u.key[0], ())}
        refused = course.left_out(cut)
        weights = {name: named.tensors[name] for name, _ in units}
        return cls(plan, named.shapes, units, refused, weights, {})

    def add(self, use: Contraction) -> None:
        """Take in a call."""
        place = use.tensor, use.offset
        if place not in self.units:
            return
        total = _read(use)
        count = total.new_tensor([len(use.inputs) * use.outputs])
        known = self.sums.get(place)
        if known is None:
            self.sums[place] = _Sum(replace(use, inputs=use.inputs[:0]), total, count)
        else:
            known.total += total
            known.count += count

    def gather(self) -> None:
        """Sums over all processes, in an order that is the same everywhere."""
        for place in self.units:
            known = self.sums.get(place)
            if known is not None:
                all_sum(known.total, known.count)

    def of(self, place: _Place) -> Tensor | None:
        """Mean of what the surviving outputs of a consumer have lost, float64, shape ``(outputs,)``."""
        known = self.sums.get(place)
        if known is None:
            return None
        unit, use = self.units[place], known.use
        shape = torch.Size(self.shapes[use.tensor])
        gone = torch.ones(use.weight.shape[2], dtype=torch.bool)
        gone[kept_inputs(self.plan, unit, use, shape)[1]] = False
        gone = gone.to(known.total.device)
        mean = known.total[:, gone] / known.count
        lost = torch.einsum("brct,bct->br", use.weight[:, :, gone].double(), mean).flatten()
        return lost[kept_outputs(self.plan, unit, use, shape).to(lost.device)]


def _measure(dense: nn.Module, plan: PruningPlan, batches: Iterable[Any], samples: int | None) -> tuple[Batch, _Losses]:
    """The first batch, and what the consumers lose on average over all of them."""
    first: Batch | None = None
    losses: _Losses | None = None
    seen = 0
    for batch in _stream(batches, device_of(dense)):
        if first is None or losses is None:
            first, losses = batch, _Losses.prepare(dense, plan, batch)
        with ContractionWatch(losses.weights, losses.add):
            forward(dense, batch)
        seen += batch.size
        if samples is not None and seen >= samples:
            break
    if first is None or losses is None:
        raise DataError("folding read no sample: the source is empty, or a generator that was used up before.")
    losses.gather()
    return first, losses


def _stream(batches: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    for raw in progress(batch_source(batches), "measuring the means of removed channels"):
        batch = read_batch(raw, device)
        if batch.size:
            yield batch


def _read(use: Contraction) -> Tensor:
    """Sum over samples and output positions of what each tap reads, zero padding included."""
    total = use.inputs.sum(0, dtype=torch.float64)
    if use.window is None:
        return total.flatten(2)
    rank = len(use.window[0])
    kernel, stride, padding, dilation = (list(v) * (rank if len(v) == 1 else 1) for v in use.window)
    total = nn.functional.pad(total, [p for size in reversed(padding) for p in (size, size)])
    for d, (taps, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        total = total.unfold(2 + d, (taps - 1) * gap + 1, step)[..., ::gap]
    return total.sum(tuple(range(2, 2 + rank))).flatten(2)


def _write(small: nn.Module, example: Batch, losses: _Losses, unread: str) -> None:
    """Put the losses into the constants; say which consumers stay as they are."""
    course = _survey(small, example, {})
    places = {(u.key[0], u.key[1]): (u.key[0], u.offset) for u in losses.units.values()}
    sites: dict[_Place, Site] = {}

    def note(arrival: Arrival) -> None:
        if arrival.unit.key in places:
            sites[places[arrival.unit.key]] = arrival.site()

    with Follow(small, (u for u in course.units if u.key in places), note):
        forward(small, example)
    left = dict(losses.refused)
    for place in losses.units:
        lost = losses.of(place)
        if place not in sites:
            left[place[0]] = course.refused.get(place[0], "the pruned network takes another course there")
        elif lost is None:
            left[place[0]] = unread
        elif not add_constant(sites[place], lost):
            left[place[0]] = "it has no bias of its own and no batch norm behind it"
    if left:
        lines = "; ".join(f"'{name}': {why}" for name, why in itertools.islice(left.items(), 5))
        more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(f"consumers of removed channels left without their constant: {lines}{more}.", AttrimWarning, 3)


def _survey(model: nn.Module, batch: Batch, cut: Mapping[str, tuple[int, ...]]) -> Course:
    survey = Survey(model)
    with survey:
        forward(model, batch)
    return survey.course(cut)


def _example(inputs: Any, device: torch.device) -> Batch:
    """Example inputs as a batch."""
    moved = to_device(inputs, device)
    args, kwargs = (), {}
    if isinstance(moved, Mapping):
        kwargs = {str(name): value for name, value in moved.items()}
    else:
        args = tuple(moved) if isinstance(moved, list | tuple) else (moved,)
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if first is None:
        raise InputError(
            f"example_inputs: expected a tensor, a tuple or a dict of tensors, found {type(inputs).__name__}."
        )
    return Batch(args, kwargs, None, len(first) if first.ndim else 1, moved)
