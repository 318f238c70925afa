"""Data sources: parquet in the hub's layouts, image folders, hub names; the split is the same every time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from attrim.errors import DataError
from attrim.recover import open_data
from attrim.recover.sources import open_source

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def png(value: int, side: int = 8) -> bytes:
    """An image whose every pixel says which row it is."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, count: int, *, image: str = "img", label: str = "label", side: int = 8, labels=None) -> None:
    """A parquet file as the hub has them: encoded images in a struct, class names in the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [i % 3 for i in range(count)] if labels is None else labels
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["ant", "bee", "cat"])})
    rows = {image: [{"bytes": png(i % 256, side), "path": None} for i in range(count)], label: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def values(batches) -> list[int]:
    return [round(v) for x, _ in batches for v in (x[:, 0, 0, 0] * 255).tolist()]


def plain(path: Path, **options):
    return open_data(str(path), **{"shape": (3, 8, 8), "mean": (0.0,), "std": (1.0,), **options})


def test_parquet_folder(tmp_path):
    write(tmp_path / "d" / "train.parquet", 40)
    write(tmp_path / "d" / "test.parquet", 6)
    data = plain(tmp_path / "d", batch_size=5)
    assert data.classes == ("ant", "bee", "cat")
    assert data.splits == ("train", "holdout", "test")
    assert values(data.batches("train")) == list(range(36))
    assert values(data.batches("holdout")) == [36, 37, 38, 39]  # the last tenth
    assert values(data.batches("test")) == list(range(6))
    _, labels = next(iter(data.batches("train")))
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert labels.dtype == torch.int64


def test_limit_takes_a_prefix_and_leaves_the_test_split_whole(tmp_path):
    write(tmp_path / "d" / "train.parquet", 40)
    write(tmp_path / "d" / "test.parquet", 6)
    data = plain(tmp_path / "d", limit=3)
    assert values(data.batches("train")) == [0, 1, 2]
    assert values(data.batches("holdout")) == [36, 37, 38]
    assert len(data.rows("test")) == 6


def test_the_test_split_is_not_read_before_it_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "d" / "train.parquet", 20)
    write(tmp_path / "d" / "test.parquet", 6)
    read: list[int] = []
    monkeypatch.setattr(
        "attrim.recover.data.decode",
        lambda pictures, *_: read.append(len(list(pictures))) or torch.zeros((read[-1], 3, 8, 8), dtype=torch.uint8),
    )
    data = plain(tmp_path / "d")
    data.batches("train"), data.batches("train", augment=True), data.batches("holdout")
    assert read == [18, 2]
    data.batches("test")
    assert read == [18, 2, 6]


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("plain/train/0000.parquet", "plain/train/0001.parquet", "plain/test/0000.parquet"),
    ],
)
def test_layouts_of_the_hub(tmp_path, names):
    for name in names:
        write(tmp_path / "d" / name, 10)
    source = open_source(str(tmp_path / "d"))
    assert (len(source.train), len(source.holdout), len(source.test)) == (18, 2, 10)


def test_validation_becomes_the_hold_out_or_the_test(tmp_path):
    write(tmp_path / "d" / "train.parquet", 10)
    write(tmp_path / "d" / "validation.parquet", 5)
    source = open_source(str(tmp_path / "d"))
    assert (len(source.train), len(source.holdout), len(source.test)) == (9, 1, 5)
    write(tmp_path / "d" / "test.parquet", 4)
    source = open_source(str(tmp_path / "d"))
    assert (len(source.train), len(source.holdout), len(source.test)) == (10, 5, 4)


def test_one_file(tmp_path):
    write(tmp_path / "mine.parquet", 20, image="image", label="target")
    data = plain(tmp_path / "mine.parquet")
    assert data.splits == ("train", "holdout")
    assert values(data.batches("holdout")) == [18, 19]
    with pytest.raises(DataError, match=r"has no test split\. It has: train, holdout"):
        data.batches("test")
    write(tmp_path / "test.parquet", 20)
    assert plain(tmp_path / "test.parquet").splits == ("test",)


def test_rows_sorted_by_class_are_mixed_the_same_way_every_time(tmp_path):
    write(tmp_path / "train.parquet", 30, labels=[i // 10 for i in range(30)])
    first, again = (values(plain(tmp_path / "train.parquet").batches("train")) for _ in range(2))
    assert first == again
    assert first != sorted(first)
    assert {v // 10 for v in first[:9]} == {0, 1, 2}


def test_image_folder(tmp_path):
    for split, count in (("train", 10), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "d" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(png(i + (100 if name == "dog" else 0)))
    data = plain(tmp_path / "d")
    assert data.classes == ("cat", "dog")
    assert (len(data.rows("train")), len(data.rows("holdout")), len(data.rows("test"))) == (18, 2, 4)
    for x, y in data.batches("train"):
        assert torch.equal(x[:, 0, 0, 0] > 90 / 255, y == 1)


def test_large_images_go_through_transforms(tmp_path):
    write(tmp_path / "train.parquet", 12, side=80)
    data = plain(tmp_path / "train.parquet", shape=(3, 32, 32), batch_size=4)
    batches = data.batches("train", augment=True, shuffle=True)
    batches.workers = 0
    out = list(batches)
    assert len(out) == len(batches) == 2
    assert out[0][0].shape == (4, 3, 32, 32)
    assert out[0][0].dtype == torch.float32
    held = data.batches("holdout")
    held.workers = 0
    assert values(held) == [11]


def test_grey_input_takes_the_mean_of_three_figures(tmp_path):
    write(tmp_path / "train.parquet", 10)
    data = open_data(str(tmp_path / "train.parquet"), shape=(1, 8, 8), mean=(0.0, 0.5, 1.0), std=(0.5, 0.5, 0.5))
    assert data.mean == (0.5,)
    x, _ = next(iter(data.batches("train")))
    assert x.shape == (9, 1, 8, 8)
    assert x[0, 0, 0, 0] == -1


def test_strings_as_labels(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": ["b", "a", "b", "c"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    source = open_source(str(tmp_path / "train.parquet"))
    assert source.classes == ("a", "b", "c")
    assert source.train.labels.tolist() == [1, 0, 1]


def test_missing_columns_are_listed(tmp_path):
    features = datasets.Features({"picture_of": datasets.Value("int64"), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"picture_of": [1], "label": [0]}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    with pytest.raises(
        DataError, match=r"no image column found\. The columns are: picture_of \(int64\), label \(int64\)"
    ):
        open_source(str(tmp_path / "a.parquet"))


def test_unlabelled_rows_are_refused(tmp_path):
    write(tmp_path / "a.parquet", 3, labels=[-1, -1, -1])
    with pytest.raises(DataError, match="found the label -1; expected class indices from 0"):
        open_source(str(tmp_path / "a.parquet"))


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no data at .*expected a parquet file, a folder with train.parquet"):
        open_source(str(tmp_path / "none.parquet"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"no data at 'data/cifar'"):  # a folder of that name: not the hub
        open_source("data/cifar")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"cannot read .*broken.parquet"):
        open_source(str(tmp_path / "broken.parquet"))

    def offline(*_: object) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataError, match=r"cannot read 'user/set' \(nothing on disk has this name, .*: no network$"):
        open_source("user/set")


def test_bad_arguments(tmp_path):
    with pytest.raises(DataError, match=r"shape: expected \(channels, height, width\)"):
        open_data("x", shape=(4, 8, 8))
    with pytest.raises(DataError, match="batch_size: expected an int >= 1, found 0"):
        open_data("x", shape=(3, 8, 8), batch_size=0)


def test_without_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"needs the package 'datasets', which is not installed\. Install it with: pip"
    ):
        open_source("x")


def encoded(image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_images(path: Path, images: list[bytes], labels=None) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


@pytest.mark.parametrize("side", [8, 80])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_in_one_source(tmp_path, side, channels):
    modes = ["RGB", "L", "RGBA", "P", "LA", "1"]
    plain_images = [Image.new("RGB", (side, side), (255, 255, 255)).convert(mode) for mode in modes]
    write_images(tmp_path / "test.parquet", [encoded(image) for image in plain_images])
    data = plain(tmp_path / "test.parquet", shape=(channels, 8, 8), workers=0)
    for augment in (False, True):
        images, _ = next(iter(data.batches("test", augment=augment)))
        assert images.shape == (6, channels, 8, 8)
        assert images[:, :, 4, 4].unique().tolist() == [1]


def test_small_images_of_mixed_sizes_are_resized_with_their_proportions_kept(tmp_path):
    sizes = [(8, 8), (30, 10), (10, 30), (64, 64), (20, 12)]
    images = []
    for width, height in sizes:
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        pixels[top : top + side, left : left + side] = 255
        images.append(encoded(Image.fromarray(pixels)))
    write_images(tmp_path / "test.parquet", images)
    data = plain(tmp_path / "test.parquet", shape=(3, 6, 6), workers=0)
    batch, labels = next(iter(data.batches("test")))
    assert batch.shape == (5, 3, 6, 6)
    assert batch[:, :, 1:-1, 1:-1].min() > 0.99  # the middle square of each, not the black beside it
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_large_images_by_timm_settings(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    write_images(tmp_path / "test.parquet", [encoded(picture)])
    timm_data = pytest.importorskip("timm.data")
    expected = timm_data.create_transform(
        (3, 32, 32), interpolation="bicubic", crop_pct=0.95, mean=(0.5,) * 3, std=(0.25,) * 3
    )(picture)
    options = {"shape": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "workers": 0}
    data = plain(tmp_path / "test.parquet", interpolation="bicubic", crop_pct=0.95, **options)
    torch.testing.assert_close(next(iter(data.batches("test")))[0][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [8, 80])
def test_an_unreadable_image_names_its_row(tmp_path, side):
    images = [png(i, side) for i in range(12)]
    images[7] = images[7][: len(images[7]) // 2]
    write_images(tmp_path / "train.parquet", images, labels=[0, 1, 2] * 4)
    data = plain(tmp_path / "train.parquet", workers=0)
    with pytest.raises(DataError, match=r"^row 7 \(counted from 0\) of '.*train.parquet' \(train\) has an image that "):
        list(data.batches("train"))


def test_rows_keep_their_number_when_they_are_mixed(tmp_path):
    images = [png(i) for i in range(40)]
    images[33] = b"no image"
    write_images(tmp_path / "train.parquet", images, labels=[i // 20 for i in range(40)])
    source = open_source(str(tmp_path / "train.parquet"))
    assert source.train.numbers.tolist() != sorted(source.train.numbers)
    assert sorted([*source.train.numbers, *source.holdout.numbers]) == list(range(40))
    with pytest.raises(DataError, match=r"^row 33 \(counted from 0\)"):
        list(source.train.pictures()), list(source.holdout.pictures())


def test_a_row_without_an_image(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": png(1), "path": None}, None, {"bytes": png(2), "path": None}], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(DataError, match=r"^row 1 \(counted from 0\) of .* has no image"):
        plain(tmp_path / "test.parquet").batches("test")


def test_the_hold_out_rows_depend_on_neither_limit_nor_seed(tmp_path):
    write(tmp_path / "train.parquet", 60, labels=[i // 20 for i in range(60)])
    held = [
        values(plain(tmp_path / "train.parquet", **options).batches("holdout"))
        for options in ({}, {"seed": 9}, {"limit": 50}, {"limit": 3})
    ]
    assert held[0] == held[1] == held[2]
    assert held[3] == held[0][:3]
    for limit in (None, 3, 50):
        assert not set(values(plain(tmp_path / "train.parquet", limit=limit).batches("train"))) & set(held[0])


def test_the_order_of_mixed_rows_is_fixed_for_good():
    from attrim.recover.sources import _shuffled

    assert _shuffled(10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]  # as plain integers give it
    large = _shuffled(100_000)
    assert np.array_equal(np.sort(large), np.arange(100_000))
    assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("labels", "mixed"),
    [
        ([0] * 50 + [1] * 50 + [0] * 50 + [1] * 50, True),  # two files, each sorted
        ([i // 20 for i in reversed(range(200))], True),
        (np.random.default_rng(0).integers(0, 3, 200).tolist(), False),
        ([i % 3 for i in range(200)], False),
        ([1] * 200, False),
    ],
)
def test_rows_that_come_class_by_class_are_noticed(labels, mixed):
    from attrim.recover.sources import _clumped

    assert _clumped(np.array(labels)) is mixed


def test_an_image_folder_does_not_depend_on_the_order_of_its_making(tmp_path):
    names = [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(12)]
    for folder, order in (("a", names), ("b", names[::-1])):
        for name in order:
            path = tmp_path / folder / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(names.index(name)))
    first, second = (
        [values(plain(tmp_path / folder).batches(split)) for split in ("train", "holdout")] for folder in "ab"
    )
    assert first == second
    assert sorted(first[0] + first[1]) == list(range(24))


@pytest.mark.parametrize("side", [8, 80])
def test_randaugment_only_where_it_was_asked_for(tmp_path, side):
    pytest.importorskip("timm")
    rng = np.random.default_rng(0)
    images = [encoded(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))) for _ in range(16)]
    write_images(tmp_path / "test.parquet", images)
    options = {"workers": 0, "shape": (3, 8, 8), "seed": 1}
    without, asked = (plain(tmp_path / "test.parquet", randaugment=r, **options) for r in (None, "rand-m9-n4"))

    def batch(data, augment):
        return next(iter(data.batches("test", augment=augment)))[0]

    assert torch.equal(batch(asked, False), batch(without, False))
    assert torch.equal(batch(asked, "light"), batch(without, True))
    assert not torch.equal(batch(asked, True), batch(without, True))
    assert torch.equal(batch(asked, True), batch(asked, True))


@pytest.mark.parametrize("side", [8, 80])
def test_batches_are_the_same_in_every_process(tmp_path, side, monkeypatch):
    write(tmp_path / "train.parquet", 30, side=side)
    data = plain(tmp_path / "train.parquet", batch_size=4, workers=0)
    alone = [labels.tolist() for _, labels in data.batches("train", shuffle=True)]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda *_: 1)
    torch.manual_seed(7)
    assert [labels.tolist() for _, labels in data.batches("train", shuffle=True)] == alone


def test_bad_options(tmp_path):
    for options, message in (
        (
            {"interpolation": "cubic"},
            "interpolation: expected one of bilinear, bicubic, lanczos, nearest, found 'cubic'",
        ),
        ({"crop_pct": 0}, r"crop_pct: expected a number in \(0, 1\], found 0"),
        ({"workers": -1}, "workers: expected an int >= 0, found -1"),
        ({"randaugment": "strong"}, "randaugment: expected timm's notation"),
    ):
        with pytest.raises(DataError, match=message):
            plain(tmp_path, **options)
    write(tmp_path / "test.parquet", 3)
    with pytest.raises(DataError, match="augment: expected True, False or 'light', found 'heavy'"):
        plain(tmp_path / "test.parquet").batches("test", augment="heavy")
