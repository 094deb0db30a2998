"""A data set from folders of images, one folder per class."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import Dataset, Split
from capsjax.errors import DataError, how_to_install

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")


def load_image_folder(data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Reads ``data_dir/train/<class>/*`` and ``data_dir/test/<class>/*`` (png, jpg, jpeg, bmp).

    Classes and files are sorted by name. Grayscale images keep one channel (16-bit images keep
    their upper 8 bits), all others become RGB; transparency is dropped.

    Raises:
      DataError: a folder is missing or empty, the classes of the splits differ, a file cannot be
        read, or an image differs from the first in size or channels.
    """
    if data_dir is None:
        raise DataError(
            "image_folder needs --data-dir, a directory with train/<class>/ and test/<class>/"
        )
    root = Path(data_dir).expanduser()
    try:
        classes = _class_names(root / "train")
        _expect_same_classes(classes, root)
        files = {split: _image_files(root / split, classes) for split in ("train", "test")}
        expected = _decode(files["train"][0][0]).shape
        train, test = (_read_split(files[split], expected) for split in ("train", "test"))
    except OSError as error:
        raise DataError(f"image_folder cannot read {error.filename}: {error.strerror}") from error
    return Dataset("image_folder", train, test, class_names=classes)


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"image_folder expects one folder per class in {folder}, which does not exist"
        )
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


def _image_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Returns the paths of all images of a split with their labels."""
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        images = sorted(
            file
            for file in (folder / name).iterdir()
            if file.suffix.lower() in _SUFFIXES and file.name[0] != "." and file.is_file()
        )
        if not images:
            raise DataError(
                f"image_folder expects png, jpg or bmp files in {folder / name}, got none"
            )
        files += [(file, label) for file in images]
    return files


def _read_split(files: list[tuple[Path, int]], expected: tuple[int, ...]) -> Split:
    images = np.empty((len(files), *expected), np.uint8)
    for index, (file, _) in enumerate(files):
        image = _decode(file)
        if image.shape != expected:
            raise DataError(
                f"image_folder expects every image as height x width x channels {_text(expected)} "
                f"like the first, got {_text(image.shape)} in {file}"
            )
        images[index] = image
    return Split(images, np.array([label for _, label in files], np.int32))


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _decode(file: Path) -> npt.NDArray[np.uint8]:
    """Returns one image, uint8 ``[H, W, 1]`` or ``[H, W, 3]``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"image_folder needs Pillow, which is not installed: {how_to_install('data')}"
        ) from error
    try:
        with Image.open(file) as image:
            return _pixels(image)
    except PermissionError:
        raise
    # Pillow raises any of these for a damaged file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image_folder cannot read {file} as an image: {error}") from error


def _pixels(image: Any) -> npt.NDArray[np.uint8]:
    mode: str = image.mode
    if mode.startswith("I;16"):
        # Pillow's conversion to 8 bits clips at 255, which turns most images white.
        return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
    if mode in ("I", "F"):
        raise ValueError(f"pixels must have 8 or 16 bits, got 32 bits (mode {mode})")
    if mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))
