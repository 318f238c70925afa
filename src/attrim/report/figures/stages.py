"""Which groups of a network belong together, and short names for them: read from module paths, widths and the cost model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from os.path import commonprefix

import numpy as np

from attrim.core.channels import ChannelMap

__all__ = ["short_names", "stages_of"]

_LEAST_RUN = 2.0
"""Mean number of groups in a stage above which a division is worth drawing."""


def stages_of(sizes: Mapping[str, int], channels: ChannelMap | None = None) -> list[str]:
    """The stage of each group: from the module paths; else where the map's size changes; else where the width does.

    Args:
        sizes: group -> channels, in network order.
        channels: gives the size of the maps; without it only names and widths count.

    Returns:
        One name for each group, equal for neighbours of one stage; all "" where there are no stages.

    Example:
        >>> stages_of({"layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer1.2.conv1": 16, "layer2.0.conv1": 32,
        ...            "layer2.1.conv1": 32, "layer2.2.conv1": 32})
        ['layer1', 'layer1', 'layer1', 'layer2', 'layer2', 'layer2']
    """
    ways = [[_prefix(name) for name in sizes]]
    if channels is not None:
        ways.append(_by_positions(channels, list(sizes)))
    ways.append([f"{size} wide" for size in sizes.values()])
    for found in ways:
        runs = [key for key, _ in groupby(found)]
        if len(runs) > 1 and len(found) / len(runs) > _LEAST_RUN:
            return found
    return [""] * len(sizes)


def _prefix(name: str) -> str:
    """``layer1.0.conv1`` -> ``layer1``; ``stages.0.blocks.1.fc1`` -> ``stages.0``; ``features.3`` -> ``features``."""
    parts = name.split(".")
    counted = [i for i, part in enumerate(parts[:-1]) if re.search(r"\d$", part)]
    if len(counted) > 1 or (counted and not parts[counted[0]].isdigit()):
        return ".".join(parts[: counted[0] + 1])
    return ".".join(parts[: counted[0] if counted else -1])


def _by_positions(channels: ChannelMap, groups: Sequence[str]) -> list[str]:
    """Size of the largest map that the group's products run over, up to a constant: MACs divided by parameters."""
    cost = channels.cost
    weights = {
        tuple(sorted(f for f in factors if f)): int(c)
        for factors, c in zip(cost.param_terms.factors.tolist(), cost.param_terms.coefficient, strict=True)
    }
    most = np.zeros(len(cost.groups))
    for factors, c in zip(cost.mac_terms.factors.tolist(), cost.mac_terms.coefficient, strict=True):
        key = tuple(sorted(f for f in factors if f))
        if weights.get(key):
            hit = cost.widths.group[np.isin(cost.widths.row, key)]
            most[hit] = np.maximum(most[hit], int(c) / weights[key])
    found = dict(zip(cost.groups, most.tolist(), strict=True))
    names: list[str] = []
    for group in groups:
        positions = found.get(group, 0.0)
        side = round(positions**0.5)
        name = f"{side}²" if side * side == positions else f"{positions:.0f}"
        names.append(name if positions else (names[-1] if names else ""))
    return names


def short_names(groups: Sequence[str], stages: Sequence[str], longest: int = 22) -> tuple[list[str], str]:
    """Names without the stage in front and without what all of them begin with; cut in the middle where they are long.

    Returns:
        The names, and what all of them begin with.

    Example:
        >>> short_names(["layer1.0.conv1", "conv1"], ["layer1", ""])
        (['0.conv1', 'conv1'], '')
        >>> short_names(["features.0", "features.3"], ["", ""])
        (['0', '3'], 'features')
    """
    found = [name.removeprefix(f"{stage}.") if stage else name for name, stage in zip(groups, stages, strict=True)]
    shared = ""
    if len(found) > 1 and found == list(groups):
        shared = re.sub(r"[^._]*$", "", commonprefix(found))  # noqa: RUF071  (letters are meant, not paths)
        found = [name.removeprefix(shared) for name in found]
    half = (longest - 1) // 2
    return [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in found], shared.rstrip("._")
