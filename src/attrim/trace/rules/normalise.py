"""Normalisation: channels flow on, affine parameters and statistics are tied to them."""

from __future__ import annotations

from attrim.core.cost import IntArray
from attrim.trace.call import Call
from attrim.trace.labels import Cell
from attrim.trace.tracer import Option, Tracer

__all__ = ["RULES"]

_ROLES = {"weight": "scale", "bias": "shift", "running_mean": "state", "running_var": "state"}


def _affine(t: Tracer, call: Call, vector: IntArray | None, names: tuple[str, ...]) -> None:
    for name in names:
        if call.has(name) and call[name] is not None:
            value = t.value(call[name])
            t.tie(value.axes[0], vector, "normalises an axis that does not follow the cut")
            if not value.live:
                t.role(value.axes[0], _ROLES[name])


def batch_norm(t: Tracer, call: Call) -> None:
    """Per channel, so exact; statistics are cut with the channel."""
    value = t.value(call["input"])
    _affine(t, call, value.axes[1], ("weight", "bias", "running_mean", "running_var"))
    outs = call.outputs
    t.set(outs[0], value.axes, value.live)
    for out in outs[1:]:
        per_channel = out.ndim == 1 and out.shape[0] == call["input"].shape[1]  # empty in eval mode
        t.set(out, (value.axes[1],) if per_channel else (None,) * out.ndim, value.live, Cell())


def layer_norm(t: Tracer, call: Call) -> None:
    """Statistics run over the normalised axes: removing a channel changes them."""
    x = call["input"]
    value = t.value(x)
    count = len(call["normalized_shape"])
    first = x.ndim - count
    axes = list(value.axes)
    for name in ("weight", "bias"):
        if call.has(name) and call[name] is not None:
            affine = t.value(call[name])
            for k in range(count):
                t.tie(affine.axes[k], axes[first + k], "normalises an axis that does not follow the cut")
                if not affine.live:
                    t.role(affine.axes[k], _ROLES[name])
    for vector in axes[first:]:
        t.effect(vector, "layer norm statistics")
    labelled = [(k, v) for k, v in enumerate(axes[first:]) if v is not None]
    if labelled:
        _normalised_shape(t, labelled, count)
    outs = call.outputs
    t.set(outs[0], axes, value.live)
    for out in outs[1:]:
        t.set(out, (None,) * out.ndim, value.live, Cell())


def _normalised_shape(t: Tracer, labelled: list[tuple[int, IntArray]], count: int) -> None:
    """The shape is an argument: computed, repaired with the weight, or an attribute of a norm without weight."""

    def follow(k: int) -> Option:
        def action() -> None:
            for _, vector in labelled:
                found = t.attributes(len(vector))
                if found:
                    t.follow(found[min(k, len(found) - 1)], vector)

        return Option("follow an attribute", action)

    def stay() -> None:
        for _, vector in labelled:
            t.pin(vector, "the normalised shape is a constant")

    most = max(len(t.attributes(len(v))) for _, v in labelled)
    t.decide("norm", [Option("free", lambda: None), *map(follow, range(most)), Option("pin", stay)], (count,))


def group_norm(t: Tracer, call: Call) -> None:
    """Whole groups go exactly; the same place in every group changes the statistics."""
    x = call["input"]
    value = t.value(x)
    groups = call["group"]
    vector = value.axes[1]
    _affine(t, call, vector, ("weight", "bias"))
    if vector is not None:
        vector = _group_channels(t, vector, groups)
    outs = call.outputs
    t.set(outs[0], [vector if d == 1 else v for d, v in enumerate(value.axes)], value.live)
    for out in outs[1:]:
        t.set(out, (None,) * out.ndim, value.live, Cell())


def _group_channels(t: Tracer, vector: IntArray, groups: int) -> IntArray | None:
    width = len(vector) // groups
    table = vector.reshape(groups, width)

    def whole() -> IntArray:
        unit = t.merge(table, 0)
        for found in t.attributes(groups, ("num_groups", "groups"))[:1]:
            t.follow(found, unit)
        for found in t.attributes(len(vector), ("num_channels",))[:1]:
            t.follow(found, vector)
        return vector

    def places() -> IntArray:
        t.merge(table, 1)
        t.effect(vector, "group norm statistics")
        for found in t.attributes(len(vector), ("num_channels",))[:1]:
            t.follow(found, vector)
        return vector

    def stay() -> None:
        t.pin(vector, f"a group norm with a constant number of groups ({groups})")

    options = [Option("whole groups", whole), Option("the same place in every group", places)]
    if groups == 1:
        options = options[1:]
    elif groups < width:
        options = options[::-1]
    chosen: IntArray | None = t.decide("norm groups", [*options, Option("pin", stay)], (groups, width))
    return chosen


def weight_norm(t: Tracer, call: Call) -> None:
    """w = g · v / ‖v‖: labels flow from g and v into the computed weight; the norm runs over the other axes."""
    v, g, dim = call["v"], call["g"], call["dim"]
    value, scale = t.value(v), t.value(g)
    for d, vector in enumerate(value.axes):
        if d == dim:
            t.tie(scale.axes[d], vector)
            t.role(scale.axes[d], "scale")
        else:
            t.effect(vector, "weight norm")
    outs = call.outputs
    t.set(outs[0], value.axes, value.live or scale.live)
    for out in outs[1:]:
        t.set(out, scale.axes, value.live)


def local_response(t: Tracer, call: Call) -> None:
    """Softmax and its kin over an axis: removing a channel changes the others."""
    x = call.inputs[0]
    value = t.value(x)
    t.effect(value.axes[call["dim"]], f"{call.name.strip('_')} over channels")
    t.set(call.out, value.axes, value.live)


RULES = {
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm", "_batch_norm_impl_index"),
        batch_norm),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), local_response),
}  # fmt: skip
