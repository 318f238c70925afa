"""Gates on the channel groups of a network: made, attached, read, folded, saved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap
from attrim.errors import InputError
from attrim.modules.batches import device_of, read_batch, run_batch
from attrim.modules.gates.attach import Collected, Watch, attach
from attrim.modules.gates.fold import fold
from attrim.modules.gates.kinds import KINDS, Gate, Kind, SqueezeGate, make_gate
from attrim.modules.gates.places import Place, Point, Policy, find_places

__all__ = ["Gates", "evaluating"]


class Gates(nn.Module):
    """Attention gates for the channel groups of a network; a module that owns the gates' parameters and nothing else.

    A gate hangs behind each layer that produces a group's channels: behind its activation, its norm, or the layer itself,
    as far as the output goes that way and nowhere else. The network is never edited: forward hooks hang only inside
    :meth:`attached`.

    At the beginning ``se``, ``eca``, ``fbs`` and ``softmax`` let everything through unchanged.

    Args:
        model: the traced network.
        channels: its map.
        kind: ``se`` (squeeze, two layers, twice the sigmoid), ``sigmoid`` (the same with a plain sigmoid that begins at 0.95),
            ``softmax`` (the channels' mean attention is 1), ``eca``, ``fbs`` (from the layer's input) or ``sca`` (spatial and
            channel attention of CPSCA).
        groups: ids to gate; None for all that the policy allows.
        policy: ``internal`` leaves residual streams alone; ``tied`` gates every branch of a stream before the sum.
            ``input_select`` gates as ``internal``. Where the map has groups of what layers read of streams
            (:func:`attrim.modules.gates.streams.stream_inputs`), gates hang in front of these layers.
        shared: one gate for all places of a group instead of one each.
        point: ``post`` (behind the activation), ``pre`` (behind the norm) or ``conv`` (behind the layer).
        hidden: width between the two layers of a gate; None for ``max(8, size // 16)``.
        seed: of the initial weights.
        example: a batch of any form that :func:`attrim.score` takes. One pass over it shows what follows each layer, so
            that chains are exact, streams are told from products (squeeze-and-excite), and weights that read a channel are
            known for folding. Without it the order of the modules is trusted, several producers count as a stream, and a
            forward pass that goes otherwise is refused.

    Attributes:
        places: group -> where its gates hang.
        refused: group -> why it has none.
        streams: groups that several branches are added to.

    Raises:
        InputError: an unknown kind, point, policy or group, or no group that can be gated.

    Example:
        >>> gates = Gates(model, channels, kind="se", example=images)
        >>> with gates.attached(model) as collected:
        ...     outputs = model(images)
        ...     attention = collected.attention["layer1.0.conv1"][0]    # (B, 16)
    """

    def __init__(
        self,
        model: nn.Module,
        channels: ChannelMap,
        kind: Kind = "se",
        *,
        groups: Collection[str] | None = None,
        policy: Policy = "internal",
        shared: bool = False,
        point: Point = "post",
        hidden: int | None = None,
        seed: int = 0,
        example: Any = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("kind", kind, tuple(KINDS)),
            ("policy", policy, get_args(Policy)),
            ("point", point, get_args(Point)),
        ):
            if value not in known:
                raise InputError(f"{name}: expected one of {', '.join(known)}, found {value!r}.")
        if hidden is not None and (not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1):
            raise InputError(f"hidden: expected an int >= 1 or None, found {hidden!r}.")
        self.kind, self.shared = kind, shared
        batch = None if example is None else read_batch(example, device_of(model))
        with evaluating(model):
            plot = find_places(
                model,
                channels,
                point=point,
                groups=groups,
                policy=policy,
                run=None if batch is None else lambda: run_batch(model, batch),
            )
        self.places, self.refused, self.streams = dict(plot.places), dict(plot.refused), plot.streams
        if kind == "fbs":
            self._refuse_inputless()
        if not self.places:
            reasons = "; ".join(f"'{g}': {why}" for g, why in list(self.refused.items())[:3]) or "the map has no groups"
            raise InputError(f"no group can be gated: {reasons}.")
        self.members = {id: channels[id].members for id in self.places}
        self.units = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for place in (p for places in self.places.values() for p in places):
                key = self._key(place)
                if key not in self.units:
                    self.units[key] = make_gate(kind, len(place.index), place.inputs, hidden)
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        if first is not None:
            self.to(first.device, first.dtype)
        self._attached = False

    def gate_of(self, place: Place) -> Gate:
        """The gate at a place."""
        gate: Gate = self.units[self._key(place)]  # type: ignore[assignment]
        return gate

    def attached(
        self,
        model: nn.Module,
        *,
        fixed: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
        inplace: bool = False,
    ) -> AbstractContextManager[Collected]:
        """A block in which ``model`` runs with its gates; afterwards no hook is left, also after an error.

        Args:
            model: the network, or a copy of it with modules of the same names.
            fixed: group -> factors ``(size,)`` or ``(B, size)``, used instead of what the gates compute; groups that are
                not named pass unchanged.
            watch: called with each place and its tensor, before it is gated.
            inplace: overwrite outputs of torch's own modules where no gradients are recorded; faster, and only right if
                nothing else (another hook) holds them.

        Raises:
            InputError: the gates are attached already, or the network has no such modules.
        """
        return self._attach(model, fixed, watch, inplace)

    @contextmanager
    def _attach(
        self, model: nn.Module, fixed: Mapping[str, Tensor] | None, watch: Watch | None, inplace: bool
    ) -> Iterator[Collected]:
        if self._attached:
            raise InputError("these gates are attached already, and would count twice. Leave the first block before.")
        self._attached = True
        try:
            with attach(self, model, fixed, watch, inplace) as collected:
                yield collected
        finally:
            self._attached = False

    def features(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Attention of one batch without gradients, in eval mode: group -> ``(places, B, size)``.

        Example:
            >>> gates.features(model, (images, labels))["layer1.0.conv1"].mean((0, 1))    # (16,)
        """
        read = read_batch(batch, device_of(model))
        with evaluating(model), torch.no_grad(), self.attached(model) as collected:
            run_batch(model, read)
            return {group: torch.stack(values) for group, values in collected.attention.items()}

    def sharpen(self, factor: float) -> None:
        """Set the factor of the logits under the softmax of every gate; it is part of the state dict."""
        for unit in self.units.values():
            if isinstance(unit, SqueezeGate) and unit.act == "softmax":
                unit.sharpness.fill_(factor)

    def fold(self, model: nn.Module, attention: Mapping[str, Tensor], *, skip: bool = False) -> nn.Module:
        """A copy of ``model`` that computes what ``model`` computes with ``fixed=attention``, without gates.

        Factors go into the norm before the gate (or the layer's own weight and bias) where only activations with
        ``f(a x) = a f(x)`` lie between, else into the input slices of the weights that read the channel.

        Args:
            model: the network; not changed.
            attention: group -> ``(size,)``, not negative.
            skip: leave groups that cannot be folded as they are, instead of raising.

        Raises:
            InputError: factors of a wrong shape, negative or not finite; or a group that cannot be folded, with the reason.
        """
        return fold(self.places, self.members, model, attention, skip=skip)

    def _key(self, place: Place) -> str:
        name = place.group if self.shared else f"{place.group}:{place.source}"
        return name.replace(".", "/")

    def _refuse_inputless(self) -> None:
        for id, places in list(self.places.items()):
            if blind := [p.source for p in places if not p.inputs]:
                self.refused[id] = f"'{blind[0]}' is no convolution or linear layer, whose input kind='fbs' reads"
                del self.places[id]
            elif self.shared and len({p.inputs for p in places}) > 1:
                self.refused[id] = "its layers read different numbers of channels, so kind='fbs' cannot share one gate"
                del self.places[id]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, without fused kernels, and the modes of before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes:
            module.training = training
