"""``--input`` and its like: text into shapes, example inputs and lists of numbers."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from attrim.errors import InputError

__all__ = ["example", "image_shape", "numbers", "pick_device"]

_SHAPE = re.compile(r"(\d+(?:x\d+)*)(?::(int))?")


def example(text: str, device: str = "cpu") -> Tensor | tuple[Tensor, ...]:
    """Example inputs from ``1x3x32x32``; several positional ones are separated by commas, ``1x16:int`` holds zeros.

    Raises:
        InputError: the text has another form.

    Example:
        >>> example("1x3x32x32").shape, [x.dtype for x in example("1x16:int,1x8")]
        (torch.Size([1, 3, 32, 32]), [torch.int64, torch.float32])
    """
    random = torch.Generator().manual_seed(0)
    made = []
    for shape, integer in _parse(text):
        values = torch.zeros(shape, dtype=torch.int64) if integer else torch.randn(shape, generator=random)
        made.append(values.to(device))
    return made[0] if len(made) == 1 else tuple(made)


def image_shape(text: str) -> tuple[int, int, int]:
    """``(channels, height, width)`` of a single image input.

    Raises:
        InputError: the model takes something else than one batch of images.
    """
    shapes = _parse(text)
    if len(shapes) != 1 or len(shapes[0][0]) != 4 or shapes[0][1]:
        raise InputError(
            f"--data holds images, but the model's input is {text}. Expected one input of the form 1x3x32x32 "
            "(batch x channels x height x width)."
        )
    _, channels, height, width = shapes[0][0]
    return channels, height, width


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas.

    Raises:
        InputError: something in between is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option}: expected numbers separated by commas (0.5,0.5,0.5), found '{text}'.") from error


def pick_device(text: str) -> str:
    """``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        InputError: torch cannot use the device.
    """
    if text == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        if os.environ.get("LOCAL_RANK", "").isdigit():  # one GPU for each process that a launcher started
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return "cuda"
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise InputError(f"--device: torch cannot use '{text}' here ({reason}). Try --device cpu.") from error
    return text


def _parse(text: str) -> list[tuple[tuple[int, ...], bool]]:
    shapes = []
    for part in text.replace(" ", "").split(","):
        match = _SHAPE.fullmatch(part.lower())
        sizes = tuple(int(n) for n in match[1].split("x")) if match else ()
        if match is None or 0 in sizes:
            raise InputError(
                f"--input: expected sizes joined by 'x', batch first, such as 1x3x224x224 (several inputs: "
                f"1x16:int,1x8), found '{text}'."
            )
        shapes.append((sizes, match[2] is not None))
    return shapes
