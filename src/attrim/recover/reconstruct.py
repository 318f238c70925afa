"""Least-squares reconstruction: consumers are fitted anew, without labels and without training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrim.core.plan import PruningPlan
from attrim.errors import AttrimWarning, DataError, InputError, PlanError
from attrim.modules.batches import Batch, batch_source, device_of, read_batch
from attrim.modules.course.follow import Arrival, Follow, Site
from attrim.modules.course.survey import Course, Key, Survey, Unit
from attrim.modules.names import fingerprint, named_tensors
from attrim.modules.progress import progress
from attrim.recover.evaluate import restore_modes
from attrim.recover.refit.fit import RIDGES
from attrim.recover.refit.gather import Rows, Sampling, Settings, match, repair
from attrim.recover.refit.relay import Pause, relay
from attrim.recover.refit.survivors import kept_inputs, kept_outputs
from attrim.score.data import forward, undisturbed

__all__ = ["Refit", "reconstruct"]


@dataclass(frozen=True, slots=True)
class Refit:
    """What became of one layer.

    Attributes:
        tensor: name of the weight.
        before, after: squared error of its output on samples that took no part in the fit, relative to the dense
            output's size (behind the sum with a shortcut and the ReLU, where there are such).
        ridge: the damping that was chosen, as a fraction of the inputs' mean square; 0 if nothing was better than
            leaving the weight as it was.
        rows: output positions that the fit read.
    """

    tensor: str
    before: float
    after: float
    ridge: float
    rows: int


def reconstruct(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    sequence: bool = True,
    layers: Literal["all", "consumers"] = "all",
    samples: int | None = 1024,
    rectify: bool = True,
    ridges: tuple[float, ...] = RIDGES,
    memory: int = 4 << 30,
    widest: int = 4608,
    seed: int = 0,
    on_layer: Callable[[Refit], None] | None = None,
) -> nn.Module:
    """A copy of ``pruned`` whose layers are fitted to what the dense network computes. No labels, no gradients.

    Layers are taken in the order in which the network runs them. For each, the inputs come from the network as it is by
    then (pruned, and fitted up to there), the targets from the dense network: its output behind whatever batch norm
    follows; behind the sum with a shortcut, so that the shortcut's own error is made good as well; and where a ReLU comes
    next, values below zero only have to stay below zero. Each is a ridge regression towards the present weights, over
    samples of output positions; the damping is chosen on every fifth sample, which takes no part in the fit, and a layer
    is left as it was if no fit is better there. Where there is a bias or a batch norm, a constant is fitted too, and the
    batch norm gets the running statistics that are true for its new input, at the same function: recalibrating
    afterwards changes little. Convolutions (grouped and depthwise too) and matrix products are found where the operators
    run, not by their module type.

    Call it right after the cut; recalibration is not needed before. Both networks run in eval mode.

    Memory: the calibration inputs; up to ``memory`` bytes of activations of the pruned network while its forward passes
    wait for each other (more would be needed: every layer restarts the passes instead, which takes about half as many
    forward passes as there are layers); and for the targets and the rows of one layer a part of ``memory`` each.

    Args:
        dense: the original. Not changed.
        pruned: ``attrim.apply(dense, plan)``, recalibrated or not. Not changed.
        plan: what was cut.
        batches: inputs like those of training, with augmentation; labels are ignored. Under ``torch.distributed``
            every process gives its own share, and all get the same result.
        sequence: False fits each layer alone, to inputs from the dense network.
        layers: ``all``, or only the ``consumers`` of removed channels.
        samples: stop after the batch that reaches this many; None takes them all.
        rectify: False meets values below zero before a ReLU like all others.
        ridges: dampings to choose from, as fractions of the inputs' mean square, ascending.
        memory: bytes.
        widest: most unknowns of an output that are solved for at once; wider layers go in blocks.
        seed: of the choice of output positions.
        on_layer: called with a :class:`Refit` for every layer.

    Returns:
        A new module with the modes of ``pruned``.

    Raises:
        PlanError: the networks do not belong to the plan.
        DataError: no sample, or the model does not take the batches.
        InputError: an argument out of its range.

    Warns:
        AttrimWarning: consumers of removed channels that cannot be fitted, each with the reason.

    Source:
        He, Zhang, Sun, ICCV 2017, eq. 5; Zhang et al., TPAMI 2016; see :func:`attrim.recover.refit.fit.fit` for what
        is ours.

    Example:
        >>> small = attrim.apply(model, plan)
        >>> small = attrim.recover.reconstruct(model, small, plan, train_batches)
    """
    settings = Settings(tuple(ridges), rectify, widest, memory, seed)
    _check(settings, layers, samples)
    _check_networks(dense, pruned, plan)
    small = copy.deepcopy(pruned)
    held = _hold(batches, device_of(dense), samples)
    with undisturbed(dense), _evaluating(small), torch.no_grad():
        work = _Work.prepare(dense, small, plan, held, settings, layers)
        for refit in progress(work.run(sequence), "reconstructing", len(work.pairs)):
            if on_layer is not None:
                on_layer(refit)
    return small


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """Both networks, what belongs together in them, and the data.

    Attributes:
        pairs: key -> the unit of the dense and of the pruned network, in order.
        rows: key -> output positions to look at, over all batches.
        live: bytes of activations that one batch keeps alive.
    """

    dense: nn.Module
    small: nn.Module
    plan: PruningPlan
    held: list[Batch]
    settings: Settings
    pairs: Mapping[Key, tuple[Unit, Unit]]
    sampling: Sampling
    rows: Mapping[Key, int]
    live: int

    @classmethod
    def prepare(
        cls, dense: nn.Module, small: nn.Module, plan: PruningPlan, held: list[Batch], settings: Settings, layers: str
    ) -> _Work:
        cut = {name: tuple(c.keep) for name, c in plan.cuts.items()}
        courses = [_survey(model, held[0], cut) for model in (dense, small)]
        pairs, refused = match(courses[0].units, courses[1].units)
        _warn(plan, dense, {**courses[0].refused, **courses[1].refused, **refused}, pairs)
        if layers == "consumers":
            pairs = {key: pair for key, pair in pairs.items() if pair[0].dim in cut.get(key[0], ())}
        sampling = Sampling(tuple(b.size for b in held), settings.seed, settings.memory)
        rows = {key: sampling.rows(unit, held[0].size) for key, (_, unit) in pairs.items()}
        return cls(dense, small, plan, held, settings, pairs, sampling, rows, courses[1].live)

    def run(self, sequence: bool) -> Iterator[Refit]:
        if not self.pairs:
            return iter(())
        if not sequence:
            return self._alone()
        targets = self._targets()
        if self.live * len(self.held) <= self.settings.memory and not _keeps_tensors(self.small):
            return self._waiting(targets)
        return self._restarting(targets)

    def _at(self, key: Key, batch: int, arrival: Arrival) -> Tensor:
        return self.sampling.at(list(self.pairs).index(key), batch, self.rows[key], arrival.places)

    def _targets(self) -> dict[Key, list[Tensor]]:
        """What the dense network has at the comparisons: the survivors' outputs at the chosen positions."""
        shapes = named_tensors(self.dense).shapes
        found: dict[Key, list[Tensor]] = {key: [] for key in self.pairs}
        for number, batch in enumerate(progress(self.held, "running the dense network")):

            def arrive(arrival: Arrival, number: int = number) -> None:
                unit = arrival.unit
                stays = kept_outputs(self.plan, unit, arrival.use, torch.Size(shapes[unit.key[0]]))
                values = arrival.values(self._at(unit.key, number, arrival))
                found[unit.key].append(values[:, stays.to(values.device)])

            with Follow(self.dense, (pair[0] for pair in self.pairs.values()), arrive):
                forward(self.dense, batch)
        return found

    def _waiting(self, targets: dict[Key, list[Tensor]]) -> Iterator[Refit]:
        """All batches wait at a layer until it is fitted: one forward pass of the pruned network in all."""
        units = [pair[1] for pair in self.pairs.values()]

        def job(batch: Batch) -> Callable[[Pause], None]:
            def go(pause: Pause) -> None:
                with torch.no_grad(), Follow(self.small, units, pause):
                    forward(self.small, batch)

            return go

        for arrivals in relay([job(batch) for batch in self.held]):
            present = [a for a in arrivals if a is not None]
            key = present[0].unit.key
            if len(present) < len(arrivals) or any(a.unit.key != key for a in present):
                raise DataError(
                    "the network takes another course on different batches (a branch on the data), so its layers cannot be "
                    "fitted in step. Give batches of one kind, or pass memory=0 to restart the passes for every layer."
                )
            rows = Rows()
            for number, arrival in enumerate(arrivals):
                rows.add(arrival, self._at(key, number, arrival), targets[key][number])
            refit, changed = self._repair(present[0].site(), rows)
            del targets[key]
            if changed:
                for arrival in arrivals:
                    arrival.renew()
            yield refit

    def _restarting(self, targets: dict[Key, list[Tensor]]) -> Iterator[Refit]:
        """Every layer runs the network anew, up to itself."""
        for key, (_, unit) in self.pairs.items():
            rows = Rows()
            sites: list[Site] = []
            for number, batch in enumerate(self.held):

                def arrive(
                    arrival: Arrival, rows: Rows = rows, key: Key = key, number: int = number, sites: list[Site] = sites
                ) -> None:
                    rows.add(arrival, self._at(key, number, arrival), targets[key][number])
                    sites[:] = [arrival.site()]
                    raise _FarEnough

                try:
                    with Follow(self.small, [unit], arrive):
                        forward(self.small, batch)
                except _FarEnough:
                    pass
            yield self._repair(sites[0], rows)[0]

    def _alone(self) -> Iterator[Refit]:
        """Every layer by itself: inputs and targets from the dense network, as many layers a pass as memory allows."""
        sites: dict[Key, Site] = {}

        def note(arrival: Arrival) -> None:
            sites[arrival.unit.key] = arrival.site()

        with Follow(self.small, (pair[1] for pair in self.pairs.values()), note):
            forward(self.small, self.held[0])
        for keys in self._portions():
            yield from self._alone_together(keys, sites)

    def _portions(self) -> Iterator[list[Key]]:
        portion: list[Key] = []
        filled = 0
        for key, (_, unit) in self.pairs.items():
            size = 4 * self.rows[key] * (unit.columns * (unit.outputs // unit.block_outputs) + 2 * unit.outputs)
            if portion and filled + size > self.settings.memory // 2:
                yield portion
                portion, filled = [], 0
            portion.append(key)
            filled += size
        yield portion

    def _alone_together(self, keys: list[Key], sites: Mapping[Key, Site]) -> Iterator[Refit]:
        shapes = named_tensors(self.dense).shapes
        rows = {key: Rows() for key in keys}
        for number, batch in enumerate(self.held):

            def arrive(arrival: Arrival, number: int = number) -> None:
                key = arrival.unit.key
                shape, at = torch.Size(shapes[key[0]]), self._at(key, number, arrival)
                blocks, columns = kept_inputs(self.plan, arrival.unit, arrival.use, shape)
                read = arrival.inputs(at)[:, blocks][:, :, columns]
                stays = kept_outputs(self.plan, arrival.unit, arrival.use, shape)
                target = arrival.values(at)[:, stays]
                other = 0 if arrival.other is None else target - arrival.branch(at)[:, stays]
                rows[key].put(read, _through(sites[key], read) + other, target, at, arrival)

            with Follow(self.dense, (self.pairs[key][0] for key in keys), arrive):
                forward(self.dense, batch)
        for key in keys:
            yield self._repair(sites[key], rows.pop(key))[0]

    def _repair(self, site: Site, rows: Rows) -> tuple[Refit, bool]:
        change = repair(site, rows, self.settings)
        count = sum(len(part) for part in rows.inputs)
        if change is None:
            return Refit(site.unit.key[0], 0.0, 0.0, 0.0, count), False
        return Refit(site.unit.key[0], change.before, change.after, change.ridge, count), True


class _FarEnough(Exception):
    """The layer of interest was reached."""


def _through(site: Site, read: Tensor) -> Tensor:
    """What a pruned unit makes of its inputs, at the place of comparison and without the other branch."""
    moved = read.flatten(2).transpose(0, 1) @ site.weight.flatten(2).mT
    value = moved.transpose(0, 1).flatten(1)
    if site.bias is not None:
        value = value + site.bias.flatten()
    return value * site.scale.to(value.dtype) + site.shift.to(value.dtype)


def _survey(model: nn.Module, batch: Batch, cut: Mapping[str, tuple[int, ...]]) -> Course:
    survey = Survey(model)
    with survey:
        forward(model, batch)
    return survey.course(cut)


def _consumers(plan: PruningPlan, dense: nn.Module) -> Iterator[str]:
    """Weights with a cut axis other than the first, on which convolutions and linear layers have their outputs."""
    parameters = named_tensors(dense).parameters
    for name, cut in plan.cuts.items():
        if name in parameters and any(d != 0 for d in cut.keep):
            yield name


def _warn(
    plan: PruningPlan, dense: nn.Module, refused: Mapping[str, str], pairs: Mapping[Key, tuple[Unit, Unit]]
) -> None:
    fitted = {name for name, _ in pairs}
    left = {n: refused.get(n, "no convolution or matrix product was seen with it") for n in _consumers(plan, dense)}
    left = {name: why for name, why in left.items() if name not in fitted}
    if left:
        lines = "; ".join(f"'{name}': {why}" for name, why in list(left.items())[:5])
        more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(f"consumers that stay as they are: {lines}{more}.", AttrimWarning, stacklevel=4)


def _hold(batches: Iterable[Any], device: torch.device, samples: int | None) -> list[Batch]:
    held: list[Batch] = []
    seen = 0
    for raw in batch_source(batches):
        batch = read_batch(raw, device)
        if batch.size:
            held.append(batch)
            seen += batch.size
        if samples is not None and seen >= samples:
            break
    if not held:
        raise DataError("reconstruction read no sample: the source is empty, or a generator that was used up before.")
    return held


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        restore_modes(modes)


def _keeps_tensors(model: nn.Module) -> bool:
    """Whether modules hold activations in attributes: passes that wait for each other would mix them up."""
    return any(
        isinstance(value, Tensor)
        for module in model.modules()
        for name, value in vars(module).items()
        if name[0] != "_"
    )


def _check_networks(dense: nn.Module, pruned: nn.Module, plan: PruningPlan) -> None:
    for name, model in (("dense", dense), ("pruned", pruned)):
        if not isinstance(model, nn.Module):
            raise InputError(f"{name}: expected an nn.Module, found {type(model).__name__}.")
    if not isinstance(plan, PruningPlan):
        raise InputError(f"plan: expected an attrim.PruningPlan, found {type(plan).__name__}.")
    before, after = named_tensors(dense).shapes, named_tensors(pruned).shapes
    if plan.fingerprint != fingerprint(before):
        raise PlanError(
            "the plan was not made for the dense network (the fingerprints differ). Pass the one that was traced."
        )
    for name, shape in before.items():
        expected = plan.cuts[name].shape_after if name in plan.cuts else shape
        if after.get(name) != expected:
            raise PlanError(
                f"pruned: '{name}' should have shape {expected} after this plan, found {after.get(name)}. "
                "Make it with attrim.apply(dense, plan)."
            )


def _check(settings: Settings, layers: str, samples: int | None) -> None:
    limits = (
        ("layers", layers in ("all", "consumers"), "'all' or 'consumers'", layers),
        ("samples", samples is None or samples >= 1, "an int >= 1 or None", samples),
        ("memory", settings.memory >= 0, "bytes, an int >= 0", settings.memory),
        ("widest", settings.widest >= 1, "an int >= 1", settings.widest),
        ("ridges", bool(settings.ridges) and min(settings.ridges) >= 0, "numbers >= 0", settings.ridges),
    )
    for name, good, expected, found in limits:
        if not good:
            raise InputError(f"{name}: expected {expected}, found {found!r}.")
