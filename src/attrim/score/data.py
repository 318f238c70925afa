"""Going through data: the model in eval mode, one batch in memory at a time, everything put back at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import AttrimError, CriterionError, DataError
from attrim.modules.batches import Batch, batch_source, device_of, read_batch, run_batch
from attrim.modules.names import named_tensors
from attrim.modules.progress import progress

__all__ = ["forward", "require_finite", "stream", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; train flags and buffers are as before afterwards, also after an error.

    The fused attention kernel is switched off meanwhile: it bypasses the modules and weights that are to be watched.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, _version(buffer), buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in flags:
            module.training = training
        for module, name, buffer, version, before in buffers:
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(before)
            module._buffers[name] = buffer


def _version(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; inference tensors cannot be changed here and do not count."""
    return 0 if tensor.is_inference() else tensor._version


def stream(
    model: nn.Module, batches: Iterable[Any], name: str, *, samples: int | None = None, show: bool = True
) -> Iterator[Batch]:
    """The batches on the model's device, one at a time.

    Args:
        model: says which device.
        batches: see :func:`attrim.modules.batches.read_batch` for the forms of a batch.
        name: the criterion, for messages and the progress bar.
        samples: stop after the batch that reaches this many samples; None goes through all.
        show: whether to show progress when it takes longer than two seconds.

    Raises:
        CriterionError: there was no sample, or ``samples`` is not a positive int.
        DataError: a batch has no known form.
    """
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise CriterionError(f"samples: expected a positive int or None, found {samples!r}.")
    device = device_of(model)
    seen = 0
    for raw in progress(batch_source(batches), f"scoring with {name}", show=show):
        batch = read_batch(raw, device)
        if batch.size:
            yield batch
        seen += batch.size
        if samples is not None and seen >= samples:
            return
    if not seen:
        raise CriterionError(
            f"criterion '{name}' needs data and `batches` yielded no sample. A generator is empty after one pass: "
            "give a DataLoader, a list, or a fresh generator."
        )


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs; when it fails, the error says so in terms of the batch.

    Raises:
        DataError: the model does not accept the batch.
    """
    try:
        return run_batch(model, batch)
    except AttrimError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        shapes = [tuple(v.shape) for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        names = f" named {', '.join(batch.kwargs)}" if batch.kwargs else ""
        raise DataError(
            f"the model failed on a batch with inputs of shape {shapes}{names}: {type(error).__name__}: {error}. "
            "A batch is a tensor, (inputs, labels) or a dict of the model's keyword arguments and labels."
        ) from error


def require_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinite parameters before a pass over the data is spent on it.

    Raises:
        CriterionError: with the names of up to three such parameters.
    """
    bad = [
        name
        for name, tensor in named_tensors(model).tensors.items()
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all())
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CriterionError(
            f"{', '.join(map(repr, bad[:3]))}{more}: NaN or infinite weights, so channels cannot be compared. Repair "
            "the weights first; list them with: [n for n, p in model.named_parameters() if not p.isfinite().all()]."
        )
