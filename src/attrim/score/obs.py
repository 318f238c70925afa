"""obs: how much the consumers' outputs change when a channel goes and their other weights make up for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attrim.core.channels import ChannelMap
from attrim.errors import AttrimWarning, CriterionError
from attrim.modules.course.contractions import Contraction, ContractionWatch
from attrim.modules.names import named_tensors
from attrim.score.combine import reduced
from attrim.score.data import forward, stream, undisturbed
from attrim.score.gram import ConsumerGram, Form, Hessian

__all__ = ["obs"]


def obs(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    *,
    reduction: str = "sum",
    hessian: Hessian = "gram",
    form: Form = "channel",
    damping: float = 1e-3,
    centred: bool = False,
    widest: int = 8192,
    samples: int | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """``½ tr W_c ([H⁻¹]_cc)⁻¹ W_cᵀ`` in every consumer of the channel, summed over consumers (``reduction``).

    W is the consumer's weight, W_c its columns that read channel c, u its input, ``H = E[u uᵀ] + λI`` per sample and
    summed over output positions. This is half the squared error of the consumer's output when channel c is removed and
    the remaining weights are refitted by least squares, so a channel that others can replace scores low. With
    ``hessian="diagonal"`` nothing is refitted and correlations are ignored: ``½ Σ_j ‖W_j‖² H_jj``.

    Source: Hassibi & Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NIPS 1993, equation 5,
    for single weights and the loss; LeCun et al., Optimal Brain Damage, NIPS 1990, for the diagonal. Taking blocks of a
    channel's weights and the layer's own output error for the loss follows OSSCAR (Meng et al., ICML 2024) and Frantar
    & Alistarh, Optimal Brain Compression, NeurIPS 2022; the sum over consumers is our reading.

    Args:
        reduction: across consumers.
        hessian: ``gram`` or ``diagonal``.
        form: of a k×k convolution's Gram matrix. ``patch`` is exact, with columns · k² rows; ``channel`` shares the
            columns × columns matrix of the input pixels between the taps (k⁴ times smaller).
        damping: λ as a fraction of the mean diagonal of H; 0 is exact and needs linearly independent inputs.
        centred: use the covariance in place of E[u uᵀ]: the error that is left when a bias, or a batch norm that
            follows, is refitted too.
        widest: consumers with more columns than this use the diagonal, with a warning.
        samples: stop after the batch that reaches this many samples.
        progress: show progress when it takes longer than two seconds.

    Raises:
        CriterionError: a singular H (give more data or damping), NaN inputs, or a wrong option.
    """
    _check(hessian, form, damping, reduction)
    grams, seen = _watch(model, channels, batches, hessian, form, widest, samples, progress)
    by_axis: dict[tuple[str, int], list[ConsumerGram]] = {}
    for gram in grams:
        by_axis.setdefault((gram.tensor, gram.dim), []).append(gram)
    result: dict[str, Tensor] = {}
    for group in channels:
        consumers = group.with_role("in")
        readers = [by_axis.get((m.axis.tensor, m.axis.dim), []) for m in consumers]
        if readers and all(readers):
            rows = [
                torch.stack([gram.saliency(member.index, seen, damping, centred) for gram in mine]).sum(0)
                for member, mine in zip(consumers, readers, strict=True)
            ]
            result[group.id] = reduced(torch.stack(rows), reduction)
    return result


def _watch(
    model: nn.Module,
    channels: ChannelMap,
    batches: Iterable[Any],
    hessian: Hessian,
    form: Form,
    widest: int,
    samples: int | None,
    progress: bool,
) -> tuple[list[ConsumerGram], int]:
    """One Gram matrix per consumer (per part of a packed weight), and the number of samples seen."""
    tensors: Mapping[str, Tensor] = named_tensors(model).tensors
    axes = {(m.axis.tensor, m.axis.dim) for group in channels for m in group.with_role("in")}
    grams: dict[tuple[str, int, int], ConsumerGram] = {}

    def see(use: Contraction) -> None:
        if (use.tensor, use.dim) not in axes:
            return
        key = (use.tensor, use.dim, use.offset)
        if key not in grams:
            grams[key] = ConsumerGram(use, _affordable(use, hessian, form, widest), form)
        grams[key].add(use)

    seen = 0
    watched = {name: tensors[name] for name in sorted({tensor for tensor, _ in axes}) if name in tensors}
    with undisturbed(model), torch.no_grad():
        for batch in stream(model, batches, "obs", samples=samples, show=progress):
            with ContractionWatch(watched, see):
                forward(model, batch)
            seen += batch.size
    return list(grams.values()), seen


def _affordable(use: Contraction, hessian: Hessian, form: Form, widest: int) -> Hessian:
    columns = use.weight.shape[2] * (use.weight.shape[3] if form == "patch" else 1)
    if hessian == "gram" and columns > widest:
        warnings.warn(
            f"criterion 'obs': '{use.tensor}' reads {columns} columns, more than widest={widest}, so only the diagonal "
            "of its Hessian is used. Raise widest= to spend the memory.",
            AttrimWarning,
            stacklevel=2,
        )
        return "diagonal"
    return hessian


def _check(hessian: str, form: str, damping: float, reduction: str) -> None:
    if hessian not in ("gram", "diagonal"):
        raise CriterionError(f"hessian: expected gram or diagonal, found {hessian!r}.")
    if form not in ("channel", "patch"):
        raise CriterionError(f"form: expected channel or patch, found {form!r}.")
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise CriterionError(f"damping: expected a number >= 0, found {damping!r}.")
    reduced(torch.ones(1, 1), reduction)
