"""Image folders whose images are read on demand."""

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import StoredSplit
from capsjax.data.image_files import UnreadableImageError, read_image, text_of_shape, widened
from capsjax.data.stored import Names, StoredImages
from capsjax.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class _Folder:
    """The stored images of a split; see :class:`capsjax.data.stored.ImageSource`."""

    root: Path
    names: Names  # relative to the root
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    size: tuple[int, int] | None
    channels: int | None

    @functools.cached_property
    def checksum(self) -> int:
        """CRC-32 of the files' names and sizes."""
        checksum = 0
        for name in self.names:
            about = f"{name}\0{(self.root / name).stat().st_size}\n"
            checksum = zlib.crc32(about.encode(errors="surrogateescape"), checksum)
        return checksum

    def read(self, numbers: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
        """Reads images, scaled like the whole set."""
        for number in numbers:
            file = self.root / self.names[number]
            try:
                image = read_image(file, lost=Counter(), size=self.size, channels=self.channels)
            except UnreadableImageError as error:
                raise DataError(
                    f"{error}; a stream cannot leave images out: repair or remove the file"
                ) from None
            except OSError as error:
                raise DataError(
                    f"image_folder cannot read {error.filename or file}: {error.strerror}"
                ) from None
            if image.shape != self.shape:
                raise DataError(
                    f"image_folder expects every image as height x width x channels"
                    f" {text_of_shape(self.shape)} like the first, got"
                    f" {text_of_shape(image.shape)} in {file}; --image-size and --channels"
                    " convert them"
                )
            if np.result_type(image, self.dtype) != self.dtype:
                raise DataError(
                    f"image_folder expects every image of a stream as {self.dtype} like the first,"
                    f" got {image.dtype} in {file}; --input resident reads both"
                )
            yield widened(image, self.dtype)


def stored_splits(
    root: Path,
    splits: Sequence[Sequence[tuple[Path, int]]],
    size: tuple[int, int] | None,
    channels: int | None,
) -> list[StoredSplit]:
    """Returns the stored images of splits, reading only the first readable one.

    Args:
      root: the folder that contains all files.
      splits: the files of each split, with their labels.
      size: as in :func:`capsjax.data.image_files.image_pixels`.
      channels: as in :func:`capsjax.data.image_files.image_pixels`.

    Raises:
      DataError: no image can be read.
    """
    first = _first(splits[0], size, channels)
    height, width, depth = first.shape
    stored = []
    for files in splits:
        names = Names(str(file.relative_to(root)) for file, _ in files)
        source = _Folder(root, names, (height, width, depth), first.dtype, size, channels)
        labels = np.array([label for _, label in files], np.int32)
        stored.append(StoredSplit(StoredImages(source, np.arange(len(files))), labels))
    return stored


def _first(
    files: Sequence[tuple[Path, int]], size: tuple[int, int] | None, channels: int | None
) -> npt.NDArray[Any]:
    unreadable: UnreadableImageError | None = None
    for file, _ in files:
        try:
            return read_image(file, lost=Counter(), size=size, channels=channels)
        except UnreadableImageError as error:
            unreadable = unreadable or error
    raise DataError(f"image_folder finds no image: {unreadable}")
