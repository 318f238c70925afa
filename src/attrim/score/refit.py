"""refit: what a reconstruction of the consumers cannot make good, channel after channel, for each multiply-add saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap
from attrim.core.cost import CostModel, IntArray
from attrim.errors import CriterionError
from attrim.modules.course.follow import Arrival, Follow
from attrim.modules.course.rows import places
from attrim.modules.course.survey import Key, Survey, Unit
from attrim.modules.distributed import all_sum
from attrim.modules.names import named_tensors
from attrim.score.data import forward, stream, undisturbed

__all__ = ["refit"]

Price = Literal["macs", "params", "none"]

_CONSTANT = 1e-6
"""An input whose variance is less than this share of its mean square does not vary; a constant makes up for it."""

_ROUNDING = 1e-12
"""The least ridge, as a share of the inputs' mean square."""

_SHOWN = 8192
"""Output positions of a batch from which the spread of a layer's output is taken."""


def refit(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    *,
    reduction: str = "sum",
    price: Price = "macs",
    damping: float = 1e-3,
    rounds: int = 256,
    widest: int = 8192,
    samples: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The rise of the consumers' error when channels go one by one, and the weights are fitted anew after each.

    Backward elimination in every group: the channel whose removal costs least goes, the consumers' weights and the inverse
    of their Gram matrix are updated in closed form, and so on until none is left. So of two channels that say the same,
    one is free and the other is not, which a score of each channel by itself cannot know. The score is the rise at which
    the channel went (never falling along the order), relative to the spread of the dense output where it is compared:
    behind batch norm, behind the sum with a shortcut and behind the ReLU that follows. It is divided by the multiply-adds
    that one channel of the group costs, so groups can be compared: a global threshold then buys the least error for the
    budget. Made for :func:`attrim.recover.reconstruct`, which brings about what is assumed here.

    ``Σ_consumers ½ tr W_c ([H⁻¹]_cc)⁻¹ W_cᵀ / Var(output)``, W scaled by the batch norm that follows, H the centred Gram
    matrix of the input pixels (a constant is refitted too), shared by the taps of a kernel.

    Source:
        Hassibi & Stork, Optimal Brain Surgeon, NIPS 1993 (the update); OSSCAR, Meng et al., ICML 2024 (channels as
        blocks, the layer's own error). Greedy elimination over all consumers together, the place of comparison and the
        price are ours.

    Args:
        reduction: ``sum`` is the only one: the error of all consumers is one number.
        price: ``macs``, ``params`` or ``none``.
        damping: added to the diagonal of H, as a fraction of its mean.
        rounds: at most this many eliminations a group; wider groups lose several channels a round.
        widest: consumers with more columns use the diagonal of H.
        samples: stop after the batch that reaches this many samples.
        progress: show progress when it takes longer than two seconds.

    Raises:
        CriterionError: an option out of its range, a singular H, or inputs that are not finite.
    """
    _check(reduction, price, damping, rounds)
    readers = _watch(model, channels, batches, widest, samples, progress)
    result: dict[str, Tensor] = {}
    for group in channels:
        consumers = []
        for member in group.with_role("in"):
            found = readers.get((member.axis.tensor, member.axis.dim), [])
            consumers += [reader.consumer(member.index, damping) for reader in found]
            if not found:
                consumers = []
                break
        if consumers:
            rise = _eliminate(consumers, group.size, rounds)
            result[group.id] = rise / _price(channels.cost, group.id, price)
    return _comparable(result)


class _Reader:
    """Moments of the inputs of one consumer, and the spread of its output."""

    def __init__(self, arrival: Arrival, shape: tuple[int, ...], widest: int) -> None:
        unit = self.unit = arrival.unit
        scale, _ = arrival.affine()
        blocks, rows, columns, _ = arrival.use.weight.shape
        weight = arrival.use.weight.double() * scale.view(blocks, rows, 1, 1)
        self.weight = weight.transpose(2, 3).flatten(1, 2)  # (blocks, rows · taps, columns)
        self.start = _start(unit, shape)
        self.full = columns <= widest
        device = self.weight.device
        self.second = torch.zeros(blocks, columns, columns if self.full else 1, dtype=torch.float64, device=device)
        self.first = torch.zeros(blocks, columns, dtype=torch.float64, device=device)
        self.seen = torch.zeros(3, dtype=torch.float64, device=device)
        self.out_first = torch.zeros(unit.outputs, dtype=torch.float64, device=device)
        self.calls = 0
        self.pivot: Tensor | None = None

    def add(self, arrival: Arrival) -> None:
        """Take a batch in."""
        pixels = arrival.use.inputs.flatten(3).permute(1, 0, 3, 2).flatten(1, 2)  # (blocks, pixels, columns)
        pixels = pixels if pixels.dtype in (torch.float32, torch.float64) else pixels.float()
        if self.pivot is None:  # sums about a point near the mean, so that single precision does not lose the spread
            self.pivot = pixels.mean(1, keepdim=True)
        pixels = pixels - self.pivot
        product = pixels.mT @ pixels if self.full else pixels.square().sum(1)[:, :, None]
        self.second += product.double()
        self.first += pixels.sum(1, dtype=torch.float64)
        values = arrival.values(places(arrival.places, _SHOWN, self.calls)).double()
        values = values.clamp_min(0) if self.unit.rectified else values
        self.out_first += values.sum(0)
        counts = [pixels.shape[1], len(values), float(values.square().sum())]
        self.seen += torch.tensor(counts, dtype=torch.float64, device=self.seen.device)
        self.calls += 1

    def close(self) -> None:
        """Sums about zero, in float64, over all processes."""
        if self.pivot is not None:
            pivot, count = self.pivot[:, 0].double(), self.seen[0]
            if self.full:
                across = self.first[:, :, None] * pivot[:, None, :]
                self.second += across + across.mT + count * pivot[:, :, None] * pivot[:, None, :]
            else:
                self.second += (2 * self.first * pivot + count * pivot.square())[:, :, None]
            self.first += count * pivot
        all_sum(self.second, self.first, self.seen, self.out_first)

    def consumer(self, index: IntArray, damping: float) -> _Consumer:
        """The consumer as the channels of a group see it.

        Args:
            index: ``(size, k)``: positions of each channel along the contracted axis of the whole weight.
            damping: see :func:`refit`.
        """
        pixels, rows, total = self.seen.tolist()
        spread = total / max(rows, 1.0) - float((self.out_first / max(rows, 1.0)).square().sum())
        mean = self.first / max(pixels, 1.0)
        gram = self.second / max(pixels, 1.0)
        if not bool(gram.isfinite().all()):
            raise CriterionError(
                f"the inputs of '{self.unit.key[0]}' are NaN or infinite: look for NaN in the data or the weights."
            )
        square = gram.diagonal(dim1=1, dim2=2) if self.full else gram[:, :, 0]
        variance = (square - mean.square()).clamp_min(0)
        dead = variance <= _CONSTANT * square
        gram = gram - mean[:, :, None] * mean[:, None, :] if self.full else torch.diag_embed(variance)
        # A constant column says nothing and must not disturb the others by its rounding.
        gram = torch.where((dead[:, :, None] | dead[:, None, :]), 0.0, gram)
        weight = torch.where(dead[:, None, :], 0.0, self.weight) / max(spread, 1e-30) ** 0.5
        floor = _ROUNDING * square.mean(1)
        columns = torch.from_numpy(index) - self.start
        inside = ((columns >= 0) & (columns < gram.shape[1])).all(1)
        return _Consumer(weight, gram, columns, inside, damping, floor, self.unit.key[0])


class _Consumer:
    """A consumer under elimination: its weights as they would be refitted, and the inverse of its Gram matrix."""

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        columns: Tensor,
        inside: Tensor,
        damping: float,
        floor: Tensor,
        tensor: str,
    ) -> None:
        device = weight.device
        self.columns = torch.where(inside[:, None], columns, 0).to(device)
        self.inside = inside.to(device)
        self.weight = weight.clone()
        level = gram.diagonal(dim1=1, dim2=2).mean(1)
        ridge = torch.maximum(damping * level, floor)
        ridge = torch.where(ridge > 0, ridge, 1.0)
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge[:, None].expand(-1, gram.shape[1])))
        if bool(failed.any()):
            raise CriterionError(
                f"the Gram matrix of the inputs of '{tensor}' is singular. Give more data or a larger damping."
            )
        self.inverse = torch.cholesky_inverse(factor)

    def rise(self) -> Tensor:
        """What removing each channel now would add to the error; shape ``(size,)``."""
        if self.columns.shape[1] == 1:
            at = self.columns[:, 0]
            energy = self.weight.square().sum(1)[:, at]
            value = 0.5 * energy / self.inverse.diagonal(dim1=1, dim2=2)[:, at].clamp_min(1e-300)
        else:
            block = self.inverse[:, self.columns[:, :, None], self.columns[:, None, :]]
            rows = self.weight[:, :, self.columns].permute(0, 2, 3, 1)
            value = 0.5 * (rows * torch.linalg.solve(block, rows)).sum((2, 3))
        return torch.where(self.inside, value.sum(0), 0.0)

    def remove(self, chosen: Tensor) -> None:
        """Take channels out; what is left makes up for them."""
        at = self.columns[chosen[self.inside[chosen]]].flatten()
        if not len(at):
            return
        rows = self.inverse[:, at]
        share = torch.linalg.solve(rows[:, :, at], rows)
        self.weight -= self.weight[:, :, at] @ share
        self.inverse -= rows.mT @ share
        self.weight[:, :, at] = 0.0
        self.inverse[:, at] = 0.0
        self.inverse[:, :, at] = 0.0
        self.inverse[:, at, at] = 1.0


def _eliminate(consumers: list[_Consumer], size: int, rounds: int) -> Tensor:
    """The rise at which each channel went, never falling along the order; shape ``(size,)``, float64 on the CPU."""
    device = consumers[0].weight.device
    gone = torch.zeros(size, dtype=torch.bool, device=device)
    rise = torch.zeros(size, dtype=torch.float64, device=device)
    level = torch.zeros((), dtype=torch.float64, device=device)
    portion = -(-size // rounds)
    order = []
    while not bool(gone.all()):
        now = torch.stack([consumer.rise() for consumer in consumers]).sum(0)
        now = torch.where(gone, float("inf"), now)
        left = int((~gone).sum())
        chosen = now.argsort(stable=True)[: min(portion, left)]
        for one in chosen:
            level = torch.maximum(level, now[one])
            rise[one] = level
        gone[chosen] = True
        order.append(chosen)
        for consumer in consumers:
            consumer.remove(chosen)
    # Channels that rose alike keep the order in which they went.
    rise[torch.cat(order)] *= 1 + 3e-7 * torch.arange(size, dtype=torch.float64, device=device)
    return rise.cpu()


def _watch(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    widest: int,
    samples: int | None,
    progress: bool,
) -> dict[tuple[str, int], list[_Reader]]:
    """One reader per consumer (per part of a packed weight), by the axis that it contracts."""
    cut: dict[str, set[int]] = {}
    for group in channels:
        for member in group.with_role("in"):
            cut.setdefault(member.axis.tensor, set()).add(member.axis.dim)
    shapes = named_tensors(model).shapes
    readers: dict[Key, _Reader] = {}
    units: list[Unit] = []

    def arrive(arrival: Arrival) -> None:
        if arrival.unit.key not in readers:
            readers[arrival.unit.key] = _Reader(arrival, shapes[arrival.unit.key[0]], widest)
        readers[arrival.unit.key].add(arrival)

    with undisturbed(model), torch.no_grad():
        for number, batch in enumerate(stream(model, batches, "refit", samples=samples, show=progress)):
            if number == 0:
                survey = Survey(model)
                with survey:
                    forward(model, batch)
                course = survey.course(cut)
                units = [unit for unit in course.units if unit.dim in cut.get(unit.key[0], ())]
            with Follow(model, units, arrive):
                forward(model, batch)
    found: dict[tuple[str, int], list[_Reader]] = {}
    for reader in readers.values():
        reader.close()
        found.setdefault((reader.unit.key[0], reader.unit.dim), []).append(reader)
    return found


def _start(unit: Unit, shape: tuple[int, ...]) -> int:
    """Where the part of a packed weight begins along the contracted dimension."""
    if len(shape) != 2:
        return 0
    return unit.offset // shape[1] if unit.dim == 0 else unit.offset % shape[1]


def _price(cost: CostModel, group: str, price: Price) -> float:
    """What one channel of a whole network costs."""
    if price == "none":
        return 1.0
    value = cost.macs if price == "macs" else cost.params
    size = int(cost.sizes[cost.groups.index(group)])
    return float(max(1, value() - value({group: size - 1}))) if size > 1 else float(max(1, value()))


def _comparable(result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All scores by one number, so that they are neither tiny nor huge in float32."""
    if not result:
        return {}
    largest = max(float(value.max()) for value in result.values())
    return {group: value / max(largest, 1e-300) for group, value in result.items()}


def _check(reduction: str, price: str, damping: float, rounds: int) -> None:
    if reduction != "sum":
        raise CriterionError(
            f"reduction: criterion 'refit' adds up the error of all consumers; expected sum, found {reduction!r}."
        )
    if price not in ("macs", "params", "none"):
        raise CriterionError(f"price: expected macs, params or none, found {price!r}.")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise CriterionError(f"damping: expected a number >= 0, found {damping!r}.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise CriterionError(f"rounds: expected an int >= 1, found {rounds!r}.")
