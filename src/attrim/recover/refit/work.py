"""Going through both networks: targets from the dense one, then layer after layer of the pruned one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from attrim.core.plan import PruningPlan, within
from attrim.errors import AttrimWarning, DataError
from attrim.modules.batches import Batch
from attrim.modules.course.beyond import Beyond, FollowFar, Stream
from attrim.modules.course.follow import Arrival, Follow, Site
from attrim.modules.course.survey import Course, Key, Survey, Unit
from attrim.modules.names import named_tensors
from attrim.modules.progress import progress
from attrim.recover.refit.gather import Rows, Sampling, Settings, match, repair
from attrim.recover.refit.relay import Pause, relay
from attrim.recover.refit.survivors import kept_inputs, kept_outputs
from attrim.score.data import forward

__all__ = ["Refit", "Work"]


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


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Both networks, what belongs together in them, and the data.

    Attributes:
        pairs: key -> the unit of the dense and of the pruned network, in order.
        sums: key -> number of the dense network's sum that holds the target, where branches behind it were dropped.
        rows: key -> output positions to look at, over all batches.
        live: bytes of activations that one batch keeps alive.
    """

    dense: nn.Module
    small: nn.Module
    plan: PruningPlan
    held: list[Batch]
    settings: Settings
    pairs: Mapping[Key, tuple[Unit, Unit]]
    sums: Mapping[Key, int]
    sampling: Sampling
    rows: Mapping[Key, int]
    live: int

    @classmethod
    def prepare(
        cls, dense: nn.Module, small: nn.Module, plan: PruningPlan, held: list[Batch], settings: Settings, layers: str
    ) -> Work:
        parameters = named_tensors(dense).parameters
        cut = {name: tuple(c.keep) for name, c in plan.cuts.items() if name in parameters}
        surveys = [_survey(model, held[0]) for model in (dense, small)]
        courses, pairs, refused = _matched(surveys, cut, plan)
        _warn(courses[0], cut, {**courses[1].refused, **refused}, pairs)
        beyond = _beyond(dense, courses[0], plan, held[0])
        if not courses[0].left_out(cut) and not refused and _only_cut(dense, small, plan):
            pairs = _touched(pairs, beyond if plan.drops else None)
        if layers == "consumers":
            chosen = beyond.absorbing
            pairs = {k: pair for k, pair in pairs.items() if pair[0].dim in cut.get(k[0], ()) or k in chosen}
        sampling = Sampling(tuple(b.size for b in held), settings.seed, settings.memory)
        rows = {key: sampling.rows(unit, held[0].size) for key, (_, unit) in pairs.items()}
        return cls(
            dense,
            small,
            plan,
            held,
            settings,
            pairs,
            beyond.sums,
            sampling,
            rows,
            max((u.live for _, u in pairs.values()), default=0),
        )

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

    def _targets(self, keys: Collection[Key] | None = None) -> dict[Key, list[Tensor]]:
        """What the dense network has at the comparisons: the survivors' outputs at the chosen positions."""
        shapes = named_tensors(self.dense).shapes
        found: dict[Key, list[Tensor]] = {key: [] for key in (self.pairs if keys is None else keys)}
        for number, batch in enumerate(progress(self.held, "running the dense network")):

            def arrive(arrival: Arrival, number: int = number) -> None:
                unit = arrival.unit
                stays = kept_outputs(self.plan, unit, arrival.use, torch.Size(shapes[unit.key[0]]))
                values = arrival.values(self._at(unit.key, number, arrival))
                found[unit.key].append(values[:, stays.to(values.device)])

            with FollowFar(self.dense, (self.pairs[key][0] for key in found), arrive, self.sums):
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
        later = [key for key in keys if key in self.sums]
        targets = self._targets(later) if later else {}
        for number, batch in enumerate(self.held):

            def arrive(arrival: Arrival, number: int = number) -> None:
                key = arrival.unit.key
                shape, at = torch.Size(shapes[key[0]]), self._at(key, number, arrival)
                blocks, columns = kept_inputs(self.plan, arrival.unit, arrival.use, shape)
                read = arrival.inputs(at)[:, blocks][:, :, columns]
                stays = kept_outputs(self.plan, arrival.unit, arrival.use, shape)
                target = arrival.values(at)[:, stays]
                other = 0 if arrival.other is None else target - arrival.branch(at)[:, stays]
                target = targets[key][number] if key in targets else target
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


def _only_cut(dense: nn.Module, small: nn.Module, plan: PruningPlan) -> bool:
    """Whether nothing was changed since the cut, as far as the tensors that were not cut tell."""
    after = named_tensors(small).tensors
    return all(
        name in plan.cuts or within(name, plan.drops) or torch.equal(t, after[name])
        for name, t in named_tensors(dense).tensors.items()
    )


def _touched(pairs: Mapping[Key, tuple[Unit, Unit]], beyond: Beyond | None) -> dict[Key, tuple[Unit, Unit]]:
    """The units from the first one on that reads fewer channels or comes behind a dropped branch; before it the networks
    compute the same."""
    keys = list(pairs)
    first = next(
        (
            i
            for i, key in enumerate(keys)
            if pairs[key][0].inputs != pairs[key][1].inputs or (beyond is not None and key not in beyond.untouched)
        ),
        len(keys),
    )
    return {key: pairs[key] for key in keys[first:]}


def _survey(model: nn.Module, batch: Batch) -> Survey:
    survey = Survey(model)
    with survey:
        forward(model, batch)
    return survey


_Pairs: TypeAlias = dict[Key, tuple[Unit, Unit]]


def _matched(
    surveys: Sequence[Survey], cut: Mapping[str, tuple[int, ...]], plan: PruningPlan
) -> tuple[list[Course], _Pairs, dict[str, str]]:
    """The courses of both networks and the units that belong together; where branches are gone, the way to a comparison
    ends at the first place that both networks have."""
    courses = [survey.course(cut, without=plan.drops) for survey in surveys]
    pairs, refused = match(courses[0].units, courses[1].units)
    if not plan.drops or not refused:
        return courses, pairs, refused
    of_small = {unit.key: unit for unit in courses[1].units}
    limits = {
        unit.key: min(unit.steps, of_small[unit.key].steps)
        for unit in courses[0].units
        if unit.key in of_small and unit.key not in pairs
    }
    courses = [survey.course(cut, without=plan.drops, limits=limits) for survey in surveys]
    return courses, *match(courses[0].units, courses[1].units)


def _beyond(dense: nn.Module, course: Course, plan: PruningPlan, batch: Batch) -> Beyond:
    """Where the dense network has what the pruned one should have before dropped branches."""
    stream = Stream(dense, course.units, plan.drops)
    if plan.drops:
        with stream.inside(dense), stream:
            outputs = forward(dense, batch)
    return stream.beyond(outputs if plan.drops else None)


def _warn(
    course: Course,
    cut: Mapping[str, tuple[int, ...]],
    refused: Mapping[str, str],
    pairs: Mapping[Key, tuple[Unit, Unit]],
) -> None:
    """Say which consumers of removed channels cannot be fitted, and why."""
    left = course.left_out(cut)
    for unit in course.units:
        name = unit.key[0]
        if unit.key not in pairs and unit.dim in cut.get(name, ()):
            left[name] = refused.get(name, "the pruned network takes another course there")
    if left:
        lines = "; ".join(f"'{name}': {why}" for name, why in list(left.items())[:5])
        more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
        warnings.warn(f"consumers that stay as they are: {lines}{more}.", AttrimWarning, stacklevel=4)


def _keeps_tensors(model: nn.Module) -> bool:
    """Whether modules hold activations in attributes: passes that wait for each other would mix them up."""
    return any(
        _holds_tensor(value) for module in model.modules() for name, value in vars(module).items() if name[0] != "_"
    )


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)
