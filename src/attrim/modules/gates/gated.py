"""A network together with its gates, as one module that can be trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from attrim.errors import InputError
from attrim.modules.batches import Batch, run_batch
from attrim.modules.gates.attach import Collected
from attrim.modules.gates.gates import Gates

__all__ = ["Gated"]


class Gated(nn.Module):
    """Runs ``base`` with ``gates`` attached.

    With ``frozen`` the base is neither trained nor in train mode, whatever :meth:`train` says, so that neither a weight nor
    a running statistic of it changes.

    Args:
        base: the network. It is held, not copied: freezing switches off its gradients and puts it in eval mode.
        gates: made for it.
        frozen: whether only the gates learn.

    Attributes:
        collected: of the latest forward pass; holds live tensors until the next one, or until :meth:`release`.

    Example:
        >>> gated = Gated(copy.deepcopy(model), gates, frozen=True)
        >>> trained = attrim.recover.finetune(gated, loader, epochs=10, lr=0.05)
    """

    def __init__(self, base: nn.Module, gates: Gates, *, frozen: bool) -> None:
        super().__init__()
        self.base, self.gates, self.frozen = base, gates, frozen
        self.collected: Collected | None = None
        if frozen:
            base.requires_grad_(False)
        self.train(base.training)

    def train(self, mode: bool = True) -> Gated:
        """Set the mode of the gates, and of the base unless it is frozen."""
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the base with gated channels; inputs are those of the base."""
        self.collected = kept = Collected()
        with self.gates.attached(self.base) as collected:
            outputs = run_batch(self.base, Batch(args, kwargs, None, 0, None))
            for store in ("logits", "attention", "pooled", "places"):
                setattr(kept, store, dict(getattr(collected, store)))
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "collected": None}  # a live graph cannot be copied

    def release(self) -> Collected:
        """Hand over what was collected and hold it no longer.

        Raises:
            InputError: there was no forward pass since.
        """
        if self.collected is None:
            raise InputError("nothing was collected: run the network first, gated(images).")
        collected, self.collected = self.collected, None
        return collected
