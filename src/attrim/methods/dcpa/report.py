"""What a policy says, as plain values: for the log, and for pictures of the architecture."""

from __future__ import annotations

from typing import Any

import torch

from attrim.methods.dcpa.objective import entropy
from attrim.methods.dcpa.policy import Policy
from attrim.methods.dcpa.widths import SearchSpace

__all__ = ["attention", "candidates", "describe", "explain"]


def candidates(space: SearchSpace) -> dict[str, list[str]]:
    """Unit -> names of its candidates, in the order of the probabilities that :func:`describe` gives."""
    return {unit.name: list(unit.names) for unit in space.units}


@torch.no_grad()
def describe(policy: Policy) -> dict[str, Any]:
    """Figures of one moment, as JSON values.

    Returns:
        ``expected`` and ``likeliest``: resource -> fraction of the whole network; ``target``: likewise, the budget;
        ``widths``: group -> width of the likeliest candidate (0: dropped); ``probabilities``: unit -> of its candidates;
        ``entropy`` (nats) and ``certainty`` (largest probability), means over units.
    """
    space, prices = policy.space, policy.prices
    log_p = policy.log_probabilities()
    p, best = log_p.exp(), policy.decided().tolist()
    names = prices.names
    found: dict[str, Any] = {
        "expected": dict(zip(names, (policy.expected() / prices.whole).tolist(), strict=True)),
        "likeliest": dict(zip(names, (policy.likeliest() / prices.whole).tolist(), strict=True)),
        "target": dict(zip(names, (prices.bounds / prices.whole).tolist(), strict=True)),
        "widths": {g: 0 for u in space.units for g in u.groups} | space.kept(best),
        "probabilities": {u.name: [round(v, 6) for v in p[i, : len(u)].tolist()] for i, u in enumerate(space.units)},
    }
    if space.units:
        found |= {"entropy": float(entropy(log_p)), "certainty": float(p.max(1).values.mean())}
        found["dropped"] = [u.branch for u, k in zip(space.units, best, strict=True) if u.branch is not None and not k]
    if space.gated:
        logits = policy.channel_logits()
        for group in space.gated:
            first = space.offsets[group] - (space.size - len(logits))
            found["widths"][group] = int((logits[first : first + space.channels[group].size] >= 0).sum())
    return found


def attention(policy: Policy) -> dict[str, Any]:
    """What :func:`explain` says besides the descriptors, to four digits: for the log."""
    found = {name: value for name, value in explain(policy).items() if name != "descriptors"}
    if "layers" in found:
        found["layers"] = [[round(v, 4) for v in row] for row in found["layers"]]
    if "attention" in found:
        found["attention"] = {group: [round(v, 4) for v in row] for group, row in found["attention"].items()}
    return found


@torch.no_grad()
def explain(policy: Policy) -> dict[str, Any]:
    """What the attention looks at: ``descriptors`` and ``attention``, group -> one number for each channel (``se``), or
    ``layers``: a matrix of units that look at units (``xattn``)."""
    space = policy.space
    parts = {g: slice(o, o + space.channels[g].size) for g, o in space.offsets.items()}
    found: dict[str, Any] = {"descriptors": {g: policy.z[s].tolist() for g, s in parts.items()}}
    if policy.information is not None:
        weights = policy.information.weights(policy.z)
        if weights.ndim == 2:
            found |= {"layers": weights.tolist(), "names": [u.name for u in space.units] or list(space.gated)}
        else:
            found["attention"] = {g: weights[s].tolist() for g, s in parts.items()}
    return found
