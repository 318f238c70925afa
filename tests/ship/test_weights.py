"""Weights files: sizes, pickles, and what is near when nothing is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attrim.errors import InputError
from attrim.ship import file_size, load_weights, save_weights


def test_file_size_counts_the_weights(tmp_path):
    save_weights(nn.Linear(100, 10), tmp_path / "model.safetensors")
    size = file_size(tmp_path / "model.safetensors")
    assert 4 * 1010 < size < 4 * 1010 + 300
    assert file_size(tmp_path) == size
    with pytest.raises(InputError, match="no file at"):
        file_size(tmp_path / "none")


def test_missing_file_lists_its_neighbours(tmp_path):
    with pytest.raises(InputError, match=r"no weights file at .*a\.safetensors.*There is none in"):
        load_weights(nn.Linear(1, 1), tmp_path / "a.safetensors")
    save_weights(nn.Linear(1, 1), tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"Found there: b\.safetensors"):
        load_weights(nn.Linear(1, 1), tmp_path / "a.safetensors")


def test_pickles_are_not_read(tmp_path):
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="looks like a pickle, which can run code"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.pth")


def test_a_long_list_of_problems_is_cut_short(tmp_path):
    save_weights(nn.Linear(1, 1), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"missing from the file: 0\.weight, 0\.bias, 1\.weight and 1 more; tensors"):
        load_weights(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), tmp_path / "w.safetensors")


def test_memory_format_of_the_model_stays(tmp_path):
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    save_weights(conv, tmp_path / "w.safetensors")
    again = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again.weight, conv.weight)
    assert again.weight.is_contiguous(memory_format=torch.channels_last)


def test_meta_models_cannot_be_filled_or_saved(tmp_path):
    save_weights(nn.Linear(1, 1), tmp_path / "w.safetensors")
    with torch.device("meta"):
        empty = nn.Linear(1, 1)
    with pytest.raises(InputError, match="on the meta device"):
        load_weights(empty, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="has no values"):
        save_weights(empty, tmp_path / "v.safetensors")
