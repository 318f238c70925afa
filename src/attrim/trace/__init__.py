"""nn.Module -> ChannelMap: one labelled run of the model, checked by running cut copies."""

from __future__ import annotations

from typing import Any

from torch import nn

from attrim.core.channels import ChannelMap

__all__ = ["trace"]


def trace(model: nn.Module, example_inputs: Any, *, check: bool = False) -> ChannelMap:
    """Find the channels of a network that can be removed, what goes with each, and why the others must stay.

    The model runs once, as a copy in eval mode on fake tensors (on real ones where its control flow depends on data), while
    integer channel labels travel through its operators; then copies with random cuts are run to see which sizes follow a
    cut. Any model that runs can be traced; an operator without a rule pins what flows into it.

    Args:
        model: any ``nn.Module``. Never changed, not even its train flag.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments). Shapes matter, values only
            where control flow reads them.
        check: also cut every group and compare in numbers (float64, a few real runs); a group that differs from the masked
            original, because the code computes a number from its width, is pinned with that reason.

    Returns:
        The channel map: ``groups``, ``pinned`` (with reasons), ``cost``, ``explain(name)``.

    Raises:
        InputError: not a module, wrong kind of inputs, NaN weights, half precision on the CPU.
        TraceError: the model does not run on the inputs or cannot be copied.

    Example:
        >>> channels = attrim.trace(model, torch.randn(1, 3, 32, 32))
        >>> print(channels.explain("layer1.0.conv1.weight"))
    """
    from attrim.trace.capture import analyse

    return analyse(model, example_inputs, check=check).channel_map()
