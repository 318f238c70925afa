"""Small images in memory: normalised, cropped and flipped to the pixel, in an order that repeats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attrim.errors import DataError
from attrim.recover.tensors import TensorBatches, crop_and_flip, decode


def images(count: int = 10, side: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(count: int = 10, **options: object) -> TensorBatches:
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "batch_size": 4, **options}
    return TensorBatches(images(count), torch.arange(count), **options)  # type: ignore[arg-type]


def test_plain_batches_are_normalised_in_order():
    out = list(batches())
    assert [len(y) for _, y in out] == [4, 4, 2]
    assert len(batches()) == 3
    x = torch.cat([x for x, _ in out]).numpy()
    mean, std = np.array([0.5, 0.4, 0.3])[:, None, None], np.array([0.2, 0.3, 0.4])[:, None, None]
    np.testing.assert_allclose(x, (images().numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.cat([y for _, y in out]).tolist() == list(range(10))


def test_shuffled_batches_drop_the_short_one_and_depend_on_seed_and_epoch():
    data = batches(shuffle=True, seed=1)
    first, again = ([y.tolist() for _, y in data] for _ in range(2))
    assert first == again
    assert [len(y) for y in first] == [4, 4]
    assert len(data) == 2
    data.set_epoch(1)
    assert [y.tolist() for _, y in data] != first
    assert [y.tolist() for _, y in batches(shuffle=True, seed=2)] != first
    assert len(list(batches(3, shuffle=True))) == 1


def test_crops_are_windows_of_the_padded_image():
    plain = images(50)
    out = crop_and_flip(plain, 2, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    seen = set()
    for i in range(50):
        windows = {
            (t, s, f): (w.flip(-1) if f else w)
            for t in range(5)
            for s in range(5)
            for f in (False, True)
            for w in [padded[i, :, t : t + 6, s : s + 6]]
        }
        found = [key for key, window in windows.items() if torch.equal(window, out[i])]
        assert len(found) == 1
        seen.add(found[0])
    assert {t for t, _, _ in seen} == set(range(5))
    assert {f for _, _, f in seen} == {False, True}


def test_without_flip_nothing_is_mirrored():
    assert torch.equal(crop_and_flip(images(), 0, False, torch.Generator()), images())


def test_other_sizes_are_resized_in_the_batch():
    x, _ = next(iter(batches(size=(12, 9))))
    assert x.shape == (4, 3, 12, 9)


def test_decode_converts_and_fits():
    from PIL import Image

    grey = Image.fromarray(np.full((4, 5), 7, dtype=np.uint8))
    colour = Image.fromarray(np.full((8, 10, 3), 9, dtype=np.uint8))
    out = decode([grey, colour], 3)
    assert out.shape == (2, 3, 4, 5)
    assert out[0].unique().tolist() == [7]
    assert out[1].unique().tolist() == [9]
    assert decode([grey], 1).shape == (1, 1, 4, 5)
    with pytest.raises(DataError, match="at least one image"):
        decode([], 3)


def test_bad_arguments():
    with pytest.raises(
        DataError, match=r"mean: expected 3 numbers, one per channel, found 2\. For example --mean 0\.5"
    ):
        batches(mean=(0.5, 0.5))
    with pytest.raises(DataError, match="std: expected numbers > 0, found 0"):
        batches(std=(0, 1, 1))
    with pytest.raises(DataError, match=r"expected uint8 images of shape \(N, C, H, W\)"):
        TensorBatches(torch.zeros(2, 3, 4, 4), torch.zeros(2), mean=(0.5,), std=(0.5,))
