"""``MODEL`` on the command line: a network by library and name, or by file and function."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from attrim.errors import AttrimError, InputError, MissingDependencyError
from attrim.recover.data import IMAGENET_MEAN, IMAGENET_STD
from attrim.ship.weights import load_weights

__all__ = ["Built", "build"]

FORMS = "Expected timm:NAME (timm:resnet18), torchvision:NAME, or path/to/file.py:factory."


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A network and what its library says about its inputs.

    Attributes:
        model: in eval mode.
        input: shape of one example, or None when nobody knows.
        mean, std: how its images are normalised.
        trained: whether weights were loaded.
    """

    model: nn.Module
    input: tuple[int, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    trained: bool


def build(name: str, *, weights: str | None = None, pretrained: bool = False, num_classes: int | None = None) -> Built:
    """Build the network that ``MODEL`` names, and fill it.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME`` or ``path/to/file.py:factory``; the factory is a function or class
            that is called without arguments (``num_classes`` is handed on if it was given), or a ready module.
        weights: a safetensors file.
        pretrained: let timm or torchvision download their own weights.
        num_classes: outputs of the classifier.

    Raises:
        InputError: the name has none of these forms, or nothing answers to it.
        MissingDependencyError: timm or torchvision is not installed.
    """
    library, _, rest = name.partition(":")
    if library == "timm" and rest:
        built = _timm(rest, pretrained, num_classes)
    elif library == "torchvision" and rest:
        built = _torchvision(rest, pretrained, num_classes)
    else:
        built = _from_file(name, pretrained, num_classes)
    if weights is not None:
        load_weights(built.model, weights)
    built.model.eval()
    return Built(built.model, built.input, built.mean, built.std, pretrained or weights is not None)


def _timm(name: str, pretrained: bool, num_classes: int | None) -> Built:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError("timm", "models", f"timm:{name}") from error
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(_unknown("timm", name, timm.list_models()))
    try:
        model = timm.create_model(name, pretrained=pretrained, **_classes(num_classes))
    except Exception as error:  # downloads and constructors raise anything
        raise _build_failed(f"timm:{name}", error) from error
    settings = getattr(model, "pretrained_cfg", {}) or {}
    shape = tuple(settings.get("input_size") or (3, 224, 224))
    mean, std = settings.get("mean") or IMAGENET_MEAN, settings.get("std") or IMAGENET_STD
    return Built(model, (1, *shape), tuple(mean), tuple(std), pretrained)


def _torchvision(name: str, pretrained: bool, num_classes: int | None) -> Built:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingDependencyError("torchvision", "models", f"torchvision:{name}") from error
    if name not in models.list_models():
        raise InputError(_unknown("torchvision", name, models.list_models()))
    try:
        model = models.get_model(name, weights="DEFAULT" if pretrained else None, **_classes(num_classes))
    except Exception as error:  # downloads and constructors raise anything
        raise _build_failed(f"torchvision:{name}", error) from error
    side = 299 if name == "inception_v3" else 224
    return Built(model, (1, 3, side, side), IMAGENET_MEAN, IMAGENET_STD, pretrained)


def _from_file(name: str, pretrained: bool, num_classes: int | None) -> Built:
    path, _, factory = name.rpartition(":")
    if not path.endswith(".py") or not factory:
        missing = f" '{name}' names no function: write {name}:factory." if name.endswith(".py") else ""
        raise InputError(f"cannot tell what model '{name}' is.{missing} {FORMS}")
    if pretrained:
        raise InputError(
            "--pretrained is for timm: and torchvision: models. Pass --weights FILE.safetensors for your own."
        )
    module = _import(Path(path).expanduser())
    if not hasattr(module, factory):
        near = [key for key, value in vars(module).items() if not key.startswith("_") and _is_factory(value, module)]
        raise InputError(f"'{path}' has no '{factory}'. It has: {', '.join(near) or 'no function or class'}.")
    made = getattr(module, factory)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise InputError(
                f"'{name}' is a {type(made).__name__}; expected a function or class that makes an nn.Module."
            )
        options = _classes(num_classes)
        if options and "num_classes" not in _arguments(made):
            raise InputError(f"--num-classes: {factory}() takes no num_classes. Write it into the factory instead.")
        try:
            made = made(**options)
        except Exception as error:  # the user's own code
            raise _build_failed(name, error) from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{factory}() returned {type(made).__name__}; expected an nn.Module.")
    return Built(made, None, IMAGENET_MEAN, IMAGENET_STD, False)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no file at '{path}'. {FORMS}")
    spec = importlib.util.spec_from_file_location(f"attrim_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"'{path}' is not a Python file. {FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours, as when it is run as a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise _build_failed(str(path), error) from error
    finally:
        sys.path.pop(0)
    return module


def _is_factory(value: Any, module: ModuleType) -> bool:
    return isinstance(value, nn.Module) or (callable(value) and getattr(value, "__module__", "") == module.__name__)


def _arguments(made: Any) -> set[str]:
    parameters = inspect.signature(made).parameters.values()
    return {"num_classes" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters}


def _classes(num_classes: int | None) -> dict[str, Any]:
    return {} if num_classes is None else {"num_classes": num_classes}


def _unknown(library: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {len(known)} models."
    return f"{library} has no model '{name}'. {hint}"


def _build_failed(name: str, error: Exception) -> AttrimError:
    return InputError(f"building '{name}' failed: {type(error).__name__}: {error}. --debug shows where.")
