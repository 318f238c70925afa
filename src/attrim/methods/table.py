"""The table of methods: plain data, for :func:`attrim.prune` and for ``attrim methods``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from attrim.methods.cpsca import cpsca
from attrim.methods.dcpa import dcpa
from attrim.methods.globalpru import globalpru
from attrim.methods.outcome import Method, MethodOutcome
from attrim.methods.pcas import pcas

__all__ = ["METHODS", "Method", "MethodOutcome"]

_ALL = (
    Method(
        "pcas",
        pcas,
        "mean output of attention gates that were trained on the frozen network; one threshold for all layers",
        "Yamamoto & Maeno, PCAS, BMVC 2019",
    ),
    Method(
        "cpsca",
        cpsca,
        "mean channel attention, trained together with the network behind a spatial one; one ratio in every layer",
        "Liu et al., CPSCA, Applied Soft Computing 110, 2021",
        trains=True,
    ),
    Method(
        "globalpru",
        globalpru,
        "one order of the channels for all samples: voted by their attention, then learned by every sample, then cut",
        "Wang et al., GlobalPru, Neural Networks 171, 2024",
        trains=True,
    ),
    Method(
        "dcpa",
        dcpa,
        "widths (and depth) learned by gradient in a weight-sharing network, guided by attention to its layers",
        "Cheng et al., DCP-A, Complex & Intelligent Systems 9, 2023",
        trains=True,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""Name -> method. Not a registry: any callable criterion goes into :func:`attrim.prune` as well."""
