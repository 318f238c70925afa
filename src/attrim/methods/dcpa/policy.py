"""The policy: logits over candidate widths, branches and single channels, what they cost, and how networks are drawn."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrim.methods.dcpa.attention import Kind, make_information
from attrim.methods.dcpa.prices import Prices
from attrim.methods.dcpa.sample import Draw, Sampling, decided, pick, switch, two_paths
from attrim.methods.dcpa.widths import SearchSpace

__all__ = ["PADDING", "Policy"]

PADDING = -1e4
"""Logit of what is no candidate: its probability is exactly 0, and nothing becomes NaN."""


class Policy(nn.Module):
    """Logits ``a = θ + attention(z)`` for each unit, ``z`` being a moving average of what the layers' channels give.

    Args:
        space: what is decided.
        prices: what it costs.
        ranks: shape ``(channels,)``, flat; place of each channel in its group's order, 0 being kept longest.
        kind: ``se``, ``xattn``, ``free``, or the controls ``random`` (fixed random logits) and ``uniform``.
        reduction: of ``se``.
        balanced: whether attention moves logits as slowly as free parameters do.
        start: ``noise``: logits around 0; ``wide``: the whole width is ``e³`` times as likely as another.
        drop_prior: probability with which a branch is dropped at first. What is added to the logits for that is fixed, so
            that weight decay leads back to it.
        drop_steady: the expected cost is that of the networks that :meth:`steady` gives; otherwise of all that are drawn.
        seed: of the initial values.
        momentum: what stays of ``z`` with each new descriptor.

    Attributes:
        theta: shape ``(U, K)``; free logits of the units.
        open: shape ``(gated channels,)``; free logits of single channels.
        z: shape ``(channels,)``; the descriptor. A buffer: no gradient, no weight decay.
    """

    z: Tensor
    total: Tensor
    seen: Tensor
    since: Tensor
    valid: Tensor
    drop: Tensor
    prior: Tensor
    ranks: Tensor
    widths: Tensor
    group: Tensor
    owner: Tensor

    def __init__(
        self,
        space: SearchSpace,
        prices: Prices,
        ranks: Tensor,
        kind: Kind = "se",
        *,
        reduction: int = 16,
        balanced: bool = False,
        start: str = "noise",
        drop_prior: float = 0.02,
        drop_steady: bool = True,
        seed: int = 0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.space, self.prices, self.kind, self.momentum = space, prices, kind, momentum
        self.drop_steady = drop_steady
        valid = torch.from_numpy(space.valid())
        tables = {"valid": valid, "drop": torch.tensor([u.branch is not None for u in space.units], dtype=torch.bool)}
        tables |= {"ranks": ranks.to(torch.int64), **_tables(space)}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        size = space.size
        self.register_buffer("z", torch.zeros(size))
        self.register_buffer("total", torch.zeros(size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.zeros((), dtype=torch.int64))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            spread = 1.0 if kind == "random" else 0.01
            theta = spread * torch.randn(valid.shape)
            gated = sum(space.channels[g].size for g in space.gated)
            opened = spread * torch.randn(gated) + (0.0 if kind == "random" else 3.0)
            last = valid.sum(1) - 1
            theta[torch.arange(len(theta)), last] += 3.0 * (start == "wide")
            self.register_buffer("prior", self._prior(theta, drop_prior) * (kind != "random"), persistent=False)
            self.theta, self.open = nn.Parameter(theta), nn.Parameter(opened)
            parts = space.slices()[len(space.units) :] if space.gated else space.slices()
            most = 0 if space.gated else space.most
            self.information = make_information(kind, parts, most, self._macs(), reduction, balanced)

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return self.kind in ("se", "xattn", "free")

    @torch.no_grad()
    def observe(self, means: Tensor) -> None:
        """Take in the channels' mean activations of one batch, shape ``(channels,)``; NaN where nothing was seen."""
        means = torch.where(means.isfinite(), means, self.z).to(self.z)
        fresh = means if int(self.seen) == 0 else self.momentum * self.z + (1 - self.momentum) * means
        self.z.copy_(fresh)
        self.total.add_(means)
        self.seen.add_(1)
        self.since.add_(1)

    @torch.no_grad()
    def settle(self, last: bool) -> None:
        """At the end of an epoch: begin a new average, or, after the last one, put it in the place of ``z``."""
        if last and int(self.since):
            self.z.copy_(self.total / self.since)
        self.total.zero_()
        self.since.zero_()

    def logits(self) -> Tensor:
        """Shape ``(U, K)``."""
        added = self.information(self.z) if self.information is not None and not self.space.gated else 0.0
        return (self.theta + self.prior + added).masked_fill(~self.valid, PADDING)

    def decided(self) -> Tensor:
        """The candidate of each unit in the most probable network, shape ``(U,)``: a branch goes if that is likelier than not."""
        return decided(self.log_probabilities(), self.drop).argmax(1)

    def channel_logits(self) -> Tensor:
        """Shape ``(gated channels,)``."""
        return self.open if self.information is None or not self.space.gated else self.open + self.information(self.z)

    def log_probabilities(self) -> Tensor:
        """Shape ``(U, K)``, without noise."""
        return F.log_softmax(self.logits(), 1)

    def expected(self) -> Tensor:
        """Expected cost, shape ``(R,)``, float64, differentiable: of the noise-free probabilities.

        With ``drop_steady`` branches count in full until they are likelier to go than to stay, and then not at all, with the
        gradient of the probability: otherwise widths would be paid for with blocks that stay in the end.
        """
        moments = self._moments(self.channel_logits().double().sigmoid()) if self.space.gated else None
        p = self.logits().double().softmax(1)
        return self.prices.expected(self._settled(p) if self.drop_steady else p, moments)

    @torch.no_grad()
    def likeliest(self) -> Tensor:
        """Cost of the most probable network, shape ``(R,)``, float64."""
        moments = self._moments((self.channel_logits() >= 0).double()) if self.space.gated else None
        one_hot = F.one_hot(self.decided(), self.space.most).double()
        return self.prices.expected(one_hot, moments)

    def sample(self, tau: float | None, generator: torch.Generator | None = None, how: Sampling = "hard") -> Draw:
        """A network for one batch; with ``tau=None`` the most probable one."""
        logits = self.logits()
        opened = switch(self.channel_logits(), tau, generator, how == "soft")
        if how == "tas" and tau is not None and generator is not None:
            return self._mixed(*two_paths(logits, self.drop, tau, generator), opened)
        choice, gates = pick(logits, self.drop, tau, generator, how == "soft" and tau is not None)
        return self._drawn(choice, gates, opened)

    @torch.no_grad()
    def steady(self, draw: Draw) -> Draw:
        """The same widths, without gradients, and without just those branches that are likelier to go than to stay."""
        gone = (self.decided() == 0) & self.drop
        return Draw(draw.detach().mask, 1 - gone.to(draw.gates.dtype), draw.detach().mixes)

    @torch.no_grad()
    def anything(self, generator: torch.Generator) -> Draw:
        """A network with uniformly random widths and no branch dropped, for the warm-up."""
        level = torch.zeros_like(self.theta).masked_fill(~self.valid, PADDING)
        choice, _ = pick(level, self.drop, 1.0, generator)
        return self._drawn(choice, choice.new_ones(len(choice)), self._random_gates(generator))

    def chosen(self, widths: dict[str, int] | dict[str, Tensor], dropped: tuple[str, ...] = ()) -> Draw:
        """A network by widths (the first of each group's order) or by kept channels (indices)."""
        mask = self.z.new_ones(self.space.size)
        for group, first in self.space.offsets.items():
            part = slice(first, first + self.space.channels[group].size)
            kept = widths.get(group)
            if isinstance(kept, Tensor):
                mask[part] = 0
                mask[first + kept.to(mask.device)] = 1
            elif kept is not None:
                mask[part] = (self.ranks[part] < kept).to(mask.dtype)
        gone = torch.tensor([unit.branch in dropped for unit in self.space.units], dtype=torch.bool)
        return Draw(mask, 1 - gone.to(mask.device, mask.dtype))

    def _settled(self, p: Tensor) -> Tensor:
        """Probabilities with the decision on each branch in place of its probability, and the gradient of that."""
        gone, widths = p[:, :1], p[:, 1:]
        hard = (gone >= widths.sum(1, keepdim=True)).to(p.dtype) + gone - gone.detach()
        apart = torch.cat([hard, (1 - hard) * widths / widths.sum(1, keepdim=True).clamp(min=1e-30)], 1)
        return torch.where(self.drop[:, None], apart, p)

    def _prior(self, theta: Tensor, drop_prior: float) -> Tensor:
        """What makes a branch go with probability ``drop_prior`` at these free logits, shape ``(U, K)``."""
        found = torch.zeros_like(theta)
        if bool(self.drop.any()):
            widths = theta.masked_fill(~self.valid, PADDING)[:, 1:].logsumexp(1)
            asked = widths + math.log(drop_prior / (1 - drop_prior)) - theta[:, 0]
            found[:, 0] = torch.where(self.drop, asked, found[:, 0])
        return found

    def _drawn(self, choice: Tensor, gates: Tensor, opened: Tensor) -> Draw:
        own = self.widths[self.group] > self.ranks[: len(self.group), None]  # (channels of units, K)
        mask = (choice[self.owner] * own).sum(1)
        return Draw(torch.cat([mask, opened]), gates)

    def _mixed(self, index: Tensor, weights: Tensor, gates: Tensor, opened: Tensor) -> Draw:
        """Both candidates' channels averaged onto the wider one's, and summed (channel-wise interpolation of TAS)."""
        mask = self._drawn(F.one_hot(index.amax(1), self.space.most).to(weights.dtype), gates, opened).mask
        mixes = {}
        for u, unit in enumerate(self.space.units):
            for column, group in enumerate(unit.groups):
                first, size = self.space.offsets[group], self.space.channels[group].size
                widths = [int(unit.widths[k, column]) for k in index[u].tolist()]
                order = self.ranks[first : first + size].argsort()
                mixes[group] = _interpolated(widths, weights[u], order)
        return Draw(mask, gates, mixes)

    def _random_gates(self, generator: torch.Generator) -> Tensor:
        shares = [torch.rand((), generator=generator) * 0.875 + 0.125 for _ in self.space.gated]
        parts = [
            (torch.rand(self.space.channels[g].size, generator=generator) < share).to(self.open.dtype)
            for g, share in zip(self.space.gated, shares, strict=True)
        ]
        return torch.cat([self.open.detach().new_zeros(0), *(p.to(self.open.device) for p in parts)])

    def _moments(self, p: Tensor) -> Tensor:
        """``E[c], …, E[c⁴]`` of the number of open channels of each gated group, from independent channels."""
        sizes = torch.tensor([self.space.channels[g].size for g in self.space.gated], device=p.device)
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=p.device), sizes)
        q = p * (1 - p)
        cumulants = (p, q, q * (1 - 2 * p), q * (1 - 6 * q))
        mean, second, third, fourth = (p.new_zeros(len(sizes)).index_add(0, owner, one) for one in cumulants)
        return torch.stack(
            [
                mean,
                second + mean**2,
                third + 3 * second * mean + mean**3,
                fourth + 4 * third * mean + 3 * second**2 + 6 * second * mean**2 + mean**4,
            ],
            1,
        )

    def _macs(self) -> Tensor:
        """Cost (of the first limited resource) that depends on each unit or gated group, the others being whole."""
        if self.space.gated:
            sizes = [self.space.channels[g].size for g in self.space.gated]
            cost = self.space.channels.cost
            return torch.tensor(
                [float(cost.macs() - cost.macs({g: 1})) for g, _ in zip(self.space.gated, sizes, strict=True)]
            )
        count = len(self.space.units)
        whole = torch.tensor([[len(unit) - 1 for unit in self.space.units]])
        least = whole.repeat(count, 1)
        least[torch.arange(count), torch.arange(count)] = 0
        return (self.prices.at(whole) - self.prices.at(least))[:, 0]


def _tables(space: SearchSpace) -> dict[str, Tensor]:
    """Widths ``(groups of units, K)``, and for each of their channels the group and the unit."""
    names = [(u, unit, column, g) for u, unit in enumerate(space.units) for column, g in enumerate(unit.groups)]
    widths = np.zeros((len(names), space.most), np.int64)
    for row, (_, unit, column, _) in enumerate(names):
        widths[row, : len(unit)] = unit.widths[:, column]
    sizes = torch.tensor([space.channels[g].size for *_, g in names], dtype=torch.int64)
    owners = torch.tensor([u for u, *_ in names], dtype=torch.int64)
    return {
        "widths": torch.from_numpy(widths),
        "group": torch.repeat_interleave(torch.arange(len(names)), sizes),
        "owner": torch.repeat_interleave(owners, sizes),
    }


def _interpolated(widths: list[int], weights: Tensor, order: Tensor) -> Tensor:
    """``(size, size)``: what the consumer finds in each channel, as a mixture of the channels that there are."""
    most = max(widths)
    result = weights.new_zeros(most, most)
    for width, weight in zip(widths, weights, strict=True):
        part = F.adaptive_avg_pool1d(torch.eye(width, dtype=weights.dtype, device=weights.device)[None], most)[0].T
        result = result + weight * F.pad(part, (0, most - width))
    whole = weights.new_zeros(len(order), len(order))
    places = order[:most]
    return whole.index_put((places[:, None], places[None]), result)
