"""A pruned network on disk: ``plan.json`` and ``model.safetensors`` in one folder, loadable on the class alone."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from attrim.core.plan import PruningPlan, within
from attrim.errors import InputError, PlanError
from attrim.modules.names import named_tensors
from attrim.ship.weights import fill, read_weights, save_weights
from attrim.surgery.cut import apply

__all__ = ["PLAN_FILE", "WEIGHTS_FILE", "load", "save"]

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"


def save(model: nn.Module, plan: PruningPlan, directory: str | os.PathLike[str]) -> None:
    """Write a pruned network to a folder: the plan as JSON and the weights as safetensors, no pickle.

    Each file appears whole or not at all, and the weights carry a digest of their plan, so that a folder in which only
    one of the two was replaced is recognised by :func:`load`. Tied tensors are stored once; buffers that are not
    persistent are rebuilt by the class, as in ``state_dict``.

    Args:
        model: the network that :func:`attrim.apply` returned for ``plan``, fine-tuned or not.
        plan: the plan, for the original network.
        directory: made if it does not exist; other files in it stay.

    Raises:
        InputError: ``model`` is not a module, or holds what safetensors cannot store.
        PlanError: ``model`` does not have the shapes that the plan leaves.

    Example:
        >>> attrim.save(small, plan, "small/"); again = attrim.load("small/", model=MyNet())
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected the pruned nn.Module to save, found {type(model).__name__}.")
    if not isinstance(plan, PruningPlan):
        raise InputError(
            f"expected the PruningPlan of the model, found {type(plan).__name__}. Use attrim.allocate(...)."
        )
    _check_cut(model, plan)
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{directory}' is a file; expected a folder to save into, such as 'small/'.")
    save_weights(model, folder / WEIGHTS_FILE, {"plan": _digest(plan)})
    plan.save(folder / PLAN_FILE)


def load(directory: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Read a pruned network back: a fresh instance of the original class is cut by the plan and filled.

    Args:
        directory: what :func:`save` wrote.
        model: an *uncut* instance of the original network, with any weights. It is not changed; its device and train
            flag are those of the result.

    Returns:
        A new module whose parameters and persistent buffers equal the saved ones bit by bit.

    Raises:
        InputError: the folder or a file is missing or damaged, or the weights do not fit.
        PlanError: the plan is damaged, too new, for another model, or not the one that the weights were saved with.

    Example:
        >>> small = attrim.load("small/", model=MyNet())
    """
    _check_fresh(model)
    folder = Path(directory)
    _check_folder(folder)
    plan = PruningPlan.load(folder / PLAN_FILE)
    weights = read_weights(folder / WEIGHTS_FILE)
    if weights.metadata.get("plan", _digest(plan)) != _digest(plan):
        raise PlanError(
            f"'{directory}' is half-written: {WEIGHTS_FILE} was saved with another plan than {PLAN_FILE}. "
            "Save again: attrim.save(model, plan, directory)."
        )
    small = apply(model, plan)
    fill(small, weights)
    return small


def _check_fresh(model: Any) -> None:
    if not isinstance(model, nn.Module):
        found = model.__name__ if isinstance(model, type) else type(model).__name__
        hint = " Call the class to make an instance." if isinstance(model, type) else ""
        raise InputError(f"model: expected a fresh instance of the original nn.Module, found {found}.{hint}")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"no folder at '{folder}': expected what attrim.save(model, plan, directory) wrote.")
    missing = [name for name in (PLAN_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"'{folder}' has no {' and no '.join(missing)}: the folder is incomplete. "
            "Save again: attrim.save(model, plan, directory)."
        )


def _check_cut(model: nn.Module, plan: PruningPlan) -> None:
    named = named_tensors(model)
    left = [n for n in named.tensors if within(n, plan.drops) and n.removesuffix(".zeros") not in plan.replacements]
    if left:
        raise PlanError(
            f"the model and the plan do not belong together: the plan drops '{left[0]}' with its branch, the model still has "
            "it. Save what attrim.apply(model, plan) returned."
        )
    for name, cut in plan.cuts.items():
        found = named.tensors.get(name)
        if found is None or tuple(found.shape) != cut.shape_after:
            state = "has no such tensor" if found is None else f"has shape {tuple(found.shape)}"
            raise PlanError(
                f"the model and the plan do not belong together: the plan leaves '{name}' with shape "
                f"{cut.shape_after}, the model {state}. Save what attrim.apply(model, plan) returned."
            )


def _digest(plan: PruningPlan) -> str:
    text = json.dumps(plan.to_json(), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
