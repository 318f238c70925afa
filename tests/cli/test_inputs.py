"""Text into shapes and numbers."""

from __future__ import annotations

import pytest
import torch

from attrim.cli.inputs import example, image_shape, numbers, pick_device
from attrim.errors import InputError


def test_one_input():
    assert example("1x3x32x32").shape == (1, 3, 32, 32)
    assert torch.equal(example("2x3"), example("2x3"))


def test_several_inputs_and_integers():
    ids, mask = example("1x16:int, 1x8")
    assert (ids.shape, ids.dtype) == ((1, 16), torch.int64)
    assert (mask.shape, mask.dtype) == ((1, 8), torch.float32)


@pytest.mark.parametrize("text", ["", "3,", "1x", "1x0x3", "axb", "1x3:float", "1 3 32 32x"])
def test_other_text_is_refused(text):
    with pytest.raises(InputError, match=r"--input: expected sizes joined by 'x', batch first, such as 1x3x224x224"):
        example(text)


def test_image_shape():
    assert image_shape("4x3x24x32") == (3, 24, 32)
    for text in ("1x16", "1x3x4x4,1x2", "1x3x4x4:int"):
        with pytest.raises(InputError, match="--data holds images, but the model's input is"):
            image_shape(text)


def test_numbers():
    assert numbers("0.5,1e-1", "--mean") == (0.5, 0.1)
    with pytest.raises(InputError, match=r"--mean: expected numbers separated by commas \(0\.5,0\.5,0\.5\), found 'a'"):
        numbers("a", "--mean")


def test_device():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="--device: torch cannot use 'toaster' here"):
        pick_device("toaster")
