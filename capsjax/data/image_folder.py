"""Reads a data set from folders of images, one folder per class."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import Dataset, Split
from capsjax.data.image_files import (
    CHANNELS,
    SUFFIXES,
    UnreadableImageError,
    files_in,
    kinds,
    read_image,
    text_of_shape,
    widened,
)
from capsjax.data.stored import Names, a_tenth_of_each_class
from capsjax.data.stored_folder import stored_splits
from capsjax.errors import DataError

_SPLITS = ("train", "test")
# Other common names of the splits' folders.
_SPLIT_NAMES = {*_SPLITS, "training", "testing", "val", "valid", "validation"}
_NAMED = 5  # unreadable images that a warning names

_log = logging.getLogger(__name__)
_File = tuple[Path, int]


def load_image_folder(
    data_dir: str | os.PathLike[str] | None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    in_memory: Callable[[int], bool] | None = None,
) -> Dataset:
    """Reads the images in ``data_dir/train/<class>/`` and ``data_dir/test/<class>/``.

    Classes and files are sorted by name; subfolders of a class are read too. Without ``test``, a
    tenth of the images of each class is held out, chosen by a fixed seed. Without ``train`` either,
    the class folders are those in ``data_dir``. Warnings count and name unused files and unreadable
    images.

    Images are rotated by their EXIF orientation. 16-bit and floating-point grayscale images keep
    their precision, and the other images of the split are scaled to it. Transparent pixels are
    blended with white unless `channels` is 4.

    Args:
      data_dir: the directory.
      image_size: rows and columns. Each image is scaled, and its longer side cropped at both ends.
        When None, all images must have the same size, which is kept.
      channels: 1 (gray), 3 (RGB) or 4 (with transparency). When None, 1 for grayscale images and 3
        for others; all images must then have the same number.
      in_memory: decides from the bytes of all decoded images whether they are read now. Otherwise
        each is read on demand, must be readable, and must not have a wider dtype than the first.
        When None, all are read now.

    Raises:
      DataError: a folder is missing or empty, the classes of the splits differ, no image of a class
        can be read, or an image differs from the first in size or channels.
      ValueError: `image_size` or `channels` is invalid.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if channels is not None and channels not in CHANNELS:
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    if data_dir is None:
        raise DataError(
            "image_folder needs --data-dir, a directory with train/<class>/ and test/<class>/, or"
            " with <class>/"
        )
    root = Path(data_dir)
    try:
        folders = _split_folders(root)
        classes = _class_names(folders["train"])
        if "test" in folders:
            _expect_same_classes(classes, root)
        files = {split: _image_files(folder, classes) for split, folder in folders.items()}
        _report_skipped(root, {file for split in files.values() for file, _ in split})
        if "test" not in files:
            files = _hold_out(files["train"], root)
        if in_memory is not None:
            size = None if image_size is None else (image_size, image_size)
            splits = stored_splits(root, [files[split] for split in _SPLITS], size, channels)
            if not in_memory(sum(split.images.nbytes for split in splits)):
                names = _names(files["test"])
                return Dataset("image_folder", splits[0], splits[1], classes, test_files=names)
        read = _Reader(image_size, channels)
        train, _ = read.split(files["train"])
        test, kept = read.split(files["test"])
        for label, name in enumerate(classes):
            if label not in train.labels:
                raise read.no_image_of(name)
        read.report(root)
    except OSError as error:
        raise DataError(f"image_folder cannot read {error.filename}: {error.strerror}") from error
    return Dataset("image_folder", train, test, classes, test_files=_names(kept))


def _names(files: list[_File]) -> Names:
    return Names(str(file) for file, _ in files)


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folders of the splits, or raises a DataError."""
    expected = f"image_folder expects train/<class>/ and test/<class>/ in {root}"
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise DataError(f"{expected}, which {what}")
    if (root / "train").is_dir():
        return {split: root / split for split in _SPLITS if (root / split).is_dir()}
    entries = sorted(entry for entry in root.iterdir() if entry.name[0] != ".")
    folders = [entry for entry in entries if entry.is_dir()]
    names = ", ".join(folder.name for folder in folders)
    if root.name in _SPLITS and any((root.parent / x).is_dir() for x in _SPLITS if x != root.name):
        raise DataError(f"{expected}, got {names or 'no folders'}; did you mean {root.parent}?")
    for folder in folders:
        if (folder / "train").is_dir():
            raise DataError(f"{expected}, got {names}; did you mean {folder}?")
    if any(folder.name.lower() in _SPLIT_NAMES for folder in folders):
        raise DataError(f"{expected}, got {names}")
    if any("-ubyte" in entry.name for entry in entries):
        raise DataError(
            f"{expected}, got files in the idx format of MNIST; use --dataset mnist, or store their"
            " arrays in an .npz file and use --dataset npz"
        )
    if not folders:
        above = root.parent.parent if root.parent.name in _SPLITS else root.parent
        has_images = any(entry.suffix.lower() in SUFFIXES for entry in entries)
        hint = f"; did you mean {above}?" if has_images else ""
        raise DataError(f"{expected}, got no folders{hint}")
    return {"train": root}


def _class_names(folder: Path) -> tuple[str, ...]:
    classes = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    )
    if not classes:
        raise DataError(f"image_folder expects one folder per class in {folder}, got none")
    return classes


def _expect_same_classes(classes: tuple[str, ...], root: Path) -> None:
    in_test = _class_names(root / "test")
    for split, others, name in [
        *(("test", "train", name) for name in classes if name not in in_test),
        *(("train", "test", name) for name in in_test if name not in classes),
    ]:
        raise DataError(
            f"image_folder expects the same classes in train and test: "
            f"{root / others / name} exists, {root / split / name} does not"
        )


def _image_files(folder: Path, classes: tuple[str, ...]) -> list[_File]:
    """Returns the paths of all images of a split with their labels."""
    files: list[_File] = []
    for label, name in enumerate(classes):
        images = [file for file in files_in(folder / name) if file.suffix.lower() in SUFFIXES]
        if not images:
            raise DataError(
                f"image_folder expects images ({kinds()}) in {folder / name}, got none; remove the"
                " directory if there is no such class"
            )
        files += [(file, label) for file in images]
    return files


def _report_skipped(root: Path, used: set[Path]) -> None:
    """Warns about files that are not images or not in a class folder."""
    skipped = [file for file in files_in(root) if file not in used]
    if skipped:
        kinds = Counter(file.suffix.lower() or "without suffix" for file in skipped)
        _log.warning(
            "image_folder skips %s of %s files in %s: %s; the first is %s",
            f"{len(skipped):,}",
            f"{len(skipped) + len(used):,}",
            root,
            ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common()),
            skipped[0].relative_to(root),
        )


def _hold_out(files: list[_File], root: Path) -> dict[str, list[_File]]:
    """Holds out test images of each class."""
    chosen = a_tenth_of_each_class(np.array([label for _, label in files]))
    test = {file for file, held in zip(files, chosen, strict=True) if held}
    if not test:
        raise DataError(
            f"image_folder expects test images in {root / 'test'}, or several images per"
            " class to split them off, got one of each"
        )
    _log.info(
        "image_folder tests on %s of %s images, a tenth of each class, as there is no %s",
        f"{len(test):,}",
        f"{len(files):,}",
        root / "test",
    )
    kept = [file for file in files if file not in test]
    return {"train": kept, "test": [file for file in files if file in test]}


class _Reader:
    """Decodes images of one shape, and counts those that lose data."""

    def __init__(self, size: int | None, channels: int | None):
        self._size = None if size is None else (size, size)
        self._channels = channels
        self._expected: tuple[int, ...] | None = None
        self._lost: Counter[str] = Counter()
        self._unreadable: list[str] = []
        self._number = 0

    def split(self, files: list[_File]) -> tuple[Split, list[_File]]:
        """Reads the images of a split in the widest of their dtypes; returns their files, too."""
        images: npt.NDArray[Any] | None = None
        kept: list[_File] = []
        self._number += len(files)
        for file, label in files:
            try:
                image = read_image(file, lost=self._lost, size=self._size, channels=self._channels)
            except UnreadableImageError as error:
                self._unreadable.append(str(error))
                continue
            self._expected = self._expected or image.shape
            if image.shape != self._expected:
                raise DataError(
                    f"image_folder expects every image as height x width x channels"
                    f" {text_of_shape(self._expected)} like the first, got"
                    f" {text_of_shape(image.shape)} in {file}; --image-size and --channels"
                    " convert them"
                )
            if images is None:
                images = np.empty((len(files), *image.shape), image.dtype)
            widest = np.result_type(images, image)
            images = widened(images, widest)
            images[len(kept)] = widened(image, widest)
            kept.append((file, label))
        if images is None:
            raise DataError(f"image_folder finds no image: {self._unreadable[0]}")
        labels = np.array([label for _, label in kept], np.int32)
        return Split(images[: len(kept)], labels), kept

    def no_image_of(self, name: str) -> DataError:
        """Returns the error for a class without a readable image."""
        return DataError(f"image_folder finds no image of class {name!r}: {self._unreadable[0]}")

    def report(self, root: Path) -> None:
        """Warns about images that cannot be read or that lose data."""
        if self._unreadable:
            _log.warning(
                "image_folder leaves out %s of %s images, which cannot be read: %s%s",
                f"{len(self._unreadable):,}",
                f"{self._number:,}",
                "; ".join(self._unreadable[:_NAMED]),
                "; …" if len(self._unreadable) > _NAMED else "",
            )
        for what, number in self._lost.items():
            _log.warning("image_folder reads %s: %s files in %s", what, f"{number:,}", root)
