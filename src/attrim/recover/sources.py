"""Where labelled images come from: parquet in the hub's layout, an image folder, or a data set of the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attrim.errors import DataError, MissingDependencyError

__all__ = ["Rows", "Source", "open_source"]

HOLDOUT_ROWS = 5000
HOLDOUT_SHARE = 0.1

_AT_ONCE = 256
"""Images that are decoded together."""

_IMAGE_NAMES = ("image", "img", "images", "pixel_values", "picture")
_LABEL_NAMES = ("label", "labels", "target", "targets", "class", "y", "fine_label")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Labelled images of one split, not decoded yet.

    Attributes:
        table: a ``datasets.Dataset``.
        image: its image column.
        labels: shape ``(N,)``; class indices.
        numbers: shape ``(N,)``; which row of the source each is, from 0.
        origin: the source and its split, for messages.
    """

    table: Any
    image: str
    labels: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    origin: str

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Any:
        """The decoded image (``PIL.Image``) of a row.

        Raises:
            DataError: it cannot be decoded; the row is named.
        """
        try:
            return self._there(self.table[index][self.image], index)
        except DataError:
            raise
        except Exception as error:  # decoders raise many kinds
            raise self._unreadable(index, error) from error

    def pictures(self) -> Iterator[Any]:
        """All decoded images in order.

        Raises:
            DataError: as :meth:`picture`.
        """
        rows = iter(self.table)
        for index in range(len(self)):
            try:
                picture = next(rows)[self.image]
            except Exception as error:  # decoders raise many kinds
                raise self._unreadable(index, error) from error
            yield self._there(picture, index)

    def part(self, begin: int, end: int) -> Rows:
        """The rows from ``begin`` up to ``end``."""
        return self.pick(np.arange(begin, end))

    def pick(self, order: npt.NDArray[np.int64]) -> Rows:
        """The rows of these indices, in their order."""
        return replace(self, table=self.table.select(order), labels=self.labels[order], numbers=self.numbers[order])

    def _there(self, picture: Any, index: int) -> Any:
        if picture is None:
            raise DataError(f"{self._row(index)} has no image. Remove the row, or put an image there.")
        return picture

    def _unreadable(self, index: int, error: Exception) -> DataError:
        return DataError(
            f"{self._row(index)} has an image that cannot be decoded: {type(error).__name__}: {_first_line(error)}. "
            "Mend or remove it."
        )

    def _row(self, index: int) -> str:
        return f"row {int(self.numbers[index])} (counted from 0) of {self.origin}"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The splits of a data source.

    Attributes:
        name: what the user typed.
        classes: names of the classes, in the order of the labels.
        train: rows for training and scoring.
        holdout: rows for every choice: the last tenth of the training rows (5000 at most), or the source's own
            validation split.
        test: rows for the final figure.
    """

    name: str
    classes: tuple[str, ...]
    train: Rows | None
    holdout: Rows | None
    test: Rows | None


def open_source(name: str) -> Source:
    """Open a data source and split it the same way every time.

    Args:
        name: a parquet file, a folder with parquet files whose names tell the split (``train.parquet``,
            ``data/test-00000-of-00001.parquet``), an image folder (``train/cat/1.png``), or the name of a data set on
            the Hugging Face hub (``user/name`` or ``user/name:config``).

    Raises:
        DataError: nothing is there, or no image or label column is found (the columns are listed).
        MissingDependencyError: ``datasets`` is not installed.

    Example:
        >>> open_source("data/cifar10").classes
        ('airplane', 'automobile', …)
    """
    splits = _load(name)
    known = {split: splits[split] for split in ("train", "validation", "test") if split in splits}
    if not known:
        raise DataError(f"'{name}' has the splits {', '.join(splits)}; expected one of train, validation, test.")
    classes: tuple[str, ...] | None = None
    rows: dict[str, Rows] = {}
    for split, table in known.items():
        rows[split], classes = _read_columns(name, split, table, classes)
    test = rows.get("test", rows.get("validation"))
    train, holdout = rows.get("train"), rows.get("validation") if "test" in rows else None
    if train is not None:
        train = _mix(train)
        if holdout is None:
            train, holdout = _split(train)
    return Source(name, classes or (), train, holdout, test)


def _split(rows: Rows) -> tuple[Rows, Rows]:
    held = min(HOLDOUT_ROWS, int(len(rows) * HOLDOUT_SHARE))
    if len(rows) < 2 or held < 1:
        held = min(1, len(rows) - 1)
    cut = len(rows) - held
    return rows.part(0, cut), rows.part(cut, len(rows))


def _mix(rows: Rows) -> Rows:
    """Rows that come class by class are shuffled once, the same way everywhere: a prefix would hold a few classes."""
    return rows.pick(_shuffled(len(rows))) if _clumped(rows.labels) else rows


def _clumped(labels: npt.NDArray[np.int64]) -> bool:
    """Whether neighbours share a class far more often than in a random order, or classes only rise or only fall."""
    if len(labels) < 3 or (labels == labels[0]).all():
        return False
    steps = np.diff(labels)
    if (steps >= 0).all() or (steps <= 0).all():
        return True
    by_chance = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    return len(labels) >= 100 and float((steps == 0).mean()) > (1 + by_chance) / 2


def _shuffled(count: int) -> npt.NDArray[np.int64]:
    """A fixed order of ``count`` rows by integer arithmetic alone (splitmix64): no library may change it."""
    value = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(value ^ (value >> np.uint64(31)), kind="stable").astype(np.int64)


def _load(name: str) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "data", "reading images from parquet, folders or the hub") from error
    path = Path(name).expanduser()
    with _quiet(datasets):
        try:
            if path.is_dir() and not list(path.rglob("*.parquet")):
                return _mapping(datasets.load_dataset("imagefolder", data_dir=str(path)))
            if path.exists():
                return _mapping(datasets.load_dataset("parquet", data_files=_parquet_files(path)))
            if path.suffix or name.startswith((".", "~", "/")) or name.count("/") > 1 or _beside_a_folder(path):
                raise DataError(
                    f"no data at '{name}': expected a parquet file, a folder with train.parquet and test.parquet, or "
                    "an image folder (train/cat/1.png)."
                )
            hub, _, config = name.partition(":")
            return _mapping(datasets.load_dataset(hub, *([config] if config else [])))
        except DataError:
            raise
        except Exception as error:  # the library raises many kinds, some of them private
            place = (
                f"'{name}'"
                if path.exists()
                else f"'{name}' (nothing on disk has this name, so it was sought on the hub)"
            )
            raise DataError(f"cannot read {place}: {type(error).__name__}: {_first_line(error)}") from error


def _beside_a_folder(path: Path) -> bool:
    """Whether ``data/cifar`` is meant as a path: the hub has no user whose name is a folder here."""
    return path.parent != Path() and path.parent.is_dir()


def _mapping(loaded: Any) -> Mapping[str, Any]:
    return dict(loaded.items())


def _parquet_files(path: Path) -> dict[str, list[str]]:
    if path.is_file():
        return {_split_of(path.name) or "train": [str(path)]}
    found: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        split = _split_of(file.relative_to(path).as_posix())
        found.setdefault(split or "", []).append(str(file))
    unnamed = found.pop("", [])
    return found or {"train": unnamed}


def _split_of(text: str) -> str | None:
    words = re.split(r"[^a-z]+", text.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _read_columns(name: str, split: str, table: Any, classes: tuple[str, ...] | None) -> tuple[Rows, tuple[str, ...]]:
    features = {str(key): value for key, value in table.features.items()}
    image = _column(features, "Image", _IMAGE_NAMES)
    label = _column(features, "ClassLabel", _LABEL_NAMES)
    if image is None or label is None:
        lacking = " and ".join(what for what, found in (("image", image), ("label", label)) if found is None)
        raise DataError(
            f"'{name}' ({split}): no {lacking} column found. The columns are: {_columns(features)}. Expected an image "
            f"column ({', '.join(_IMAGE_NAMES[:2])}) and a label column ({', '.join(_LABEL_NAMES[:2])})."
        )
    if type(features[image]).__name__ != "Image":
        from datasets import Image

        table = table.cast_column(image, Image())
    values = np.asarray(table.with_format(None)[label][:])
    names = getattr(features[label], "names", None)
    if not np.issubdtype(values.dtype, np.integer):
        names = classes or tuple(sorted({str(value) for value in values}))
        index = {value: i for i, value in enumerate(names)}
        strange = sorted({str(value) for value in values} - set(index))
        if strange:
            raise DataError(f"'{name}' ({split}): labels that no other split has: {', '.join(strange[:5])}.")
        values = np.asarray([index[str(value)] for value in values])
    if len(values) == 0:
        raise DataError(f"'{name}' ({split}) has no rows.")
    if values.min() < 0:
        raise DataError(f"'{name}' ({split}): found the label {values.min()}; expected class indices from 0.")
    labels = values.astype(np.int64)
    names = names or classes or [str(i) for i in range(int(labels.max()) + 1)]
    return Rows(table, image, labels, np.arange(len(labels)), f"'{name}' ({split})"), tuple(str(n) for n in names)


def _column(features: Mapping[str, Any], kind: str, names: tuple[str, ...]) -> str | None:
    by_type = [key for key, value in features.items() if type(value).__name__ == kind]
    by_name = [key for name in names for key in features if key.lower() == name]
    preferred = [key for key in by_name if key in by_type]
    return next(iter(preferred or by_type or by_name), None)


def _columns(features: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} ({getattr(value, 'dtype', None) or type(value).__name__})" for key, value in features.items()
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no details"


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep the libraries' own bars and retry messages off the screen."""
    shown = datasets.are_progress_bars_disabled() is False
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
