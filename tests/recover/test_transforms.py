"""From an image of any kind to a model's input: the same by timm and by torchvision; RandAugment decided by its seed."""

from __future__ import annotations

import pickle
import random
import sys
import warnings

import numpy as np
import pytest
import torch

from attrim.errors import DataError, MissingDependencyError
from attrim.recover.pictures import in_channels
from attrim.recover.tensors import TensorBatches
from attrim.recover.transforms import INTERPOLATIONS, PictureTransform, RandAugment

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def picture(width: int = 90, height: int = 70):
    """A smooth image with noise in it."""
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None]
    return Image.fromarray((slope + noise).astype(np.uint8))


@pytest.fixture
def without_timm(monkeypatch):
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "timm", None)


def seeded(transform, image, seed: int = 0):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
    return transform(image)


def test_plain_images_are_resized_and_cut():
    grey = Image.fromarray(np.full((80, 120, 3), 51, dtype=np.uint8))
    out = PictureTransform((32, 32), 3)(grey)
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.uint8
    assert out.unique().tolist() == [51]


def test_the_middle_is_kept_and_proportions_too():
    image = np.zeros((64, 128, 3), dtype=np.uint8)
    image[:, 32:96] = 255  # the middle square
    out = PictureTransform((32, 32), 3, crop_pct=1.0)(Image.fromarray(image))
    assert out[:, :, 2:-2].min() == 255
    wide = PictureTransform((16, 32), 3, crop_pct=0.5)(Image.fromarray(image))
    assert wide.shape == (3, 16, 32)
    assert wide[:, :, 1:-1].min() == 255  # 32 x 64 pixels, of which the middle half; black begins beside it
    assert wide[:, :, [0, -1]].min() > 200


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_torchvision_gives_the_same_plain_images(monkeypatch, interpolation, size):
    settings = {"interpolation": interpolation, "crop_pct": 0.9}
    by_timm = PictureTransform(size, 3, **settings)(picture())
    monkeypatch.setattr("attrim.recover.transforms._timm_steps", _missing)
    torch.testing.assert_close(PictureTransform(size, 3, **settings)(picture()), by_timm)


def _missing(*_: object) -> None:
    raise ImportError("no timm")


def test_without_timm(without_timm):
    out = PictureTransform((16, 16), 3, train=True)(picture())
    assert out.shape == (3, 16, 16)
    assert out.float().std() > 0
    with pytest.raises(
        MissingDependencyError, match=r"randaugment='rand-m9' needs the package 'timm'.*attrim\[train\]"
    ):
        RandAugment("rand-m9", (16, 16), MEAN)


def test_without_both(without_timm, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'torchvision'"):
        PictureTransform((16, 16), 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmenting", [None, "rand-m9-mstd0.5-n4"])
def test_training_images_vary_with_the_seed_alone(channels, augmenting):
    extra = augmenting and RandAugment(augmenting, (32, 32), MEAN[:channels])
    transform = PictureTransform((32, 32), channels, train=True, randaugment=extra)
    first = seeded(transform, picture())
    assert first.shape == (channels, 32, 32)
    assert torch.equal(seeded(transform, picture()), first)
    assert not torch.equal(seeded(transform, picture(), 1), first)
    assert torch.equal(seeded(pickle.loads(pickle.dumps(transform)), picture()), first)  # as workers that are spawned


def test_images_that_must_not_be_mirrored():
    slope = Image.fromarray(np.tile(np.linspace(0, 255, 80).astype(np.uint8), (80, 1)))
    transforms = (PictureTransform((16, 16), 1, train=True, flip=flip) for flip in (False, True))
    rises = [[bool(t[0, 0, -1] > t[0, 0, 0]) for s in range(12) for t in [seeded(f, slope, s)]] for f in transforms]
    assert set(rises[0]) == {True}
    assert set(rises[1]) == {True, False}


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_bytes(mode, channels):
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 4), 51 * 256 + 7, dtype=np.uint16))
    else:
        image = Image.new("RGB", (4, 5), (255, 255, 255) if mode == "1" else (51, 51, 51)).convert(mode)
    assert image.mode == mode
    out = in_channels(image, channels)
    assert out.mode == ("L" if channels == 1 else "RGB")
    assert out.size == (4, 5)
    assert np.unique(np.asarray(out)).tolist() == [255 if mode == "1" else 51]


def test_a_palette_with_transparency_is_silent():
    image = Image.new("RGB", (4, 4), (51, 51, 51)).convert("P")
    image.info["transparency"] = bytes([0, 128] + [255] * 254)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.unique(np.asarray(in_channels(image, 3))).tolist() == [51]


@pytest.mark.parametrize("wrong", ["m9", "rand-q3", "rand-mx", ""])
def test_a_wrong_notation(wrong):
    with pytest.raises(
        DataError, match=r"randaugment: expected timm's notation, for example 'rand-m9-mstd0\.5', found"
    ):
        RandAugment(wrong, (32, 32), MEAN)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_of_a_batch(channels):
    images = torch.randint(
        0, 256, (24, channels, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    augment = RandAugment("rand-m9-mstd0.5", (16, 16), MEAN)
    before = torch.get_rng_state()
    out = augment.batch(images, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert out.dtype == torch.uint8
    assert out.shape == images.shape
    changed = (out != images).flatten(1).any(1)
    assert 6 < changed.sum() < 24  # each of two operations with probability a half; some of them do nothing
    assert torch.equal(augment.batch(images, torch.Generator().manual_seed(1)), out)
    assert not torch.equal(augment.batch(images, torch.Generator().manual_seed(2)), out)


def test_small_images_with_randaugment_are_decided_by_seed_and_epoch():
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = RandAugment("rand-m9-mstd0.5", (16, 16), MEAN).batch
    batches = TensorBatches(
        images, torch.arange(20), mean=MEAN, std=STD, batch_size=8, crop=2, flip=True, shuffle=True, change=change
    )
    first, again = ([x for x, _ in batches] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    batches.set_epoch(1)
    assert not torch.equal(next(iter(batches))[0], first[0])
