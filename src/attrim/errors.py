"""The tree of errors. Each message says what was expected, what was found, where, and the call that mends it.

AttrimError
├── InputError          an argument at the door is not usable (also a ValueError)
│   ├── BudgetError     a budget is malformed or cannot be reached
│   ├── CriterionError  an unknown criterion, or scores that do not fit the channel map
│   └── DataError       a data source cannot be read or has the wrong form
├── TraceError          the model could not be run or copied for tracing
├── PlanError           a plan file is corrupt, too new, or belongs to another model
├── SurgeryError        a plan fits the model but the cut network would be inconsistent
├── CheckpointError     a training checkpoint cannot be written, read, or continued
├── VerificationError   the pruned network is not the masked original
└── MissingDependencyError  an optional package is needed (also an ImportError)
"""

from __future__ import annotations

__all__ = [
    "AttrimError",
    "AttrimWarning",
    "BudgetError",
    "CheckpointError",
    "CriterionError",
    "DataError",
    "InputError",
    "MissingDependencyError",
    "PlanError",
    "SurgeryError",
    "TraceError",
    "VerificationError",
]


class AttrimError(Exception):
    """Base of every error that attrim raises on purpose."""


class AttrimWarning(UserWarning):
    """Something was done that a careful reader wants to know, and nothing is wrong yet."""


class InputError(AttrimError, ValueError):
    """An argument cannot be used as given."""


class BudgetError(InputError):
    """A budget is malformed, or no plan within its limits exists."""


class CriterionError(InputError):
    """A criterion is unknown, lacks its data, or returned scores that do not fit the channel map."""


class DataError(InputError):
    """A data source cannot be found or read, or does not have the expected columns."""


class TraceError(AttrimError):
    """The model could not be copied or run on the example inputs."""


class PlanError(AttrimError):
    """A plan cannot be read or does not belong to the model."""


class SurgeryError(AttrimError):
    """A plan names tensors that exist, but applying it would leave a module inconsistent."""


class CheckpointError(AttrimError):
    """A checkpoint of a training run cannot be written, read, or continued by this call."""


class VerificationError(AttrimError):
    """The pruned network does not compute what the masked original computes."""


class MissingDependencyError(AttrimError, ImportError):
    """An optional dependency is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. Install it with: pip install 'attrim[{extra}]'"
        )
