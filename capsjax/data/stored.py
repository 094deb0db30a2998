"""Images that stay on disk and are read and decoded on demand."""

import concurrent.futures
import dataclasses
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from capsjax.machine import processors

_CHUNK = 64  # images per read of a thread


class ImageSource(Protocol):
    """A store of images of one shape; must be picklable, to be sent to other processes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of each image."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8, uint16 or float32."""

    @property
    def checksum(self) -> int:
        """CRC-32 that identifies the images without reading them."""

    def read(self, numbers: Sequence[int]) -> Iterable[npt.NDArray[Any]]:
        """Reads the images with these numbers, in :attr:`shape` and :attr:`dtype`.

        Raises:
          DataError: an image cannot be read; the message names it.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """Images on disk, in place of an array ``[N, H, W, C]``.

    Attributes:
      source: where the images are stored.
      numbers: numbers of the images in the source, int64 ``[N]``.

    Example:
      >>> import numpy as np
      >>> from capsjax.data import StoredImages
      >>> class White:  # in place of files
      ...   shape, dtype, checksum = (8, 8, 1), np.dtype(np.uint8), 0
      ...   def read(self, numbers):
      ...     return [np.full(self.shape, 255, np.uint8) for _ in numbers]
      >>> images = StoredImages(White(), np.arange(1000))
      >>> images.shape, images.nbytes, images.take(np.array([3, 5])).read().shape
      ((1000, 8, 8, 1), 64000, (2, 8, 8, 1))
    """

    source: ImageSource
    numbers: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, H, W, C)``."""
        return len(self.numbers), *self.source.shape

    @property
    def ndim(self) -> int:
        """4."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the decoded images."""
        return np.dtype(self.source.dtype)

    @property
    def checksum(self) -> int:
        """CRC-32 that identifies the images without reading them."""
        return zlib.crc32(np.ascontiguousarray(self.numbers).data, self.source.checksum)

    @property
    def size(self) -> int:
        """Total number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes that all images would take when decoded."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: npt.NDArray[Any]) -> "StoredImages":
        """Selects images without reading them."""
        return StoredImages(self.source, self.numbers[indices])

    def read(self, *, threads: int | None = None) -> npt.NDArray[Any]:
        """Reads the images.

        Args:
          threads: number of threads; when None, that of the processors this process may use.

        Raises:
          DataError: an image cannot be read; the message names it.
        """
        images = np.empty(self.shape, self.dtype)

        def fill(first: int) -> None:
            numbers = self.numbers[first : first + _CHUNK].tolist()
            for n, image in enumerate(self.source.read(numbers), start=first):
                images[n] = image

        firsts = range(0, len(self), _CHUNK)
        if threads == 1:
            for first in firsts:
                fill(first)
            return images
        with concurrent.futures.ThreadPoolExecutor(threads or processors()) as pool:
            for _ in pool.map(fill, firsts):
                pass
        return images


class Names(Sequence[str]):
    """Many strings in two arrays, which take little memory and are quick to send to processes.

    Example:
      >>> from capsjax.data.stored import Names
      >>> Names(["cat/1.png", "dog/2.png"])[1]
      'dog/2.png'
    """

    def __init__(self, texts: Iterable[str]):
        encoded = [os.fsencode(text) for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Names(self[n] for n in range(len(self))[index])
        index = range(len(self))[index]
        first, last = self._ends[index], self._ends[index + 1]
        return os.fsdecode(self._bytes[first:last])


def a_tenth_of_each_class(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Chooses test images by a fixed seed; at least one of each class that has several images.

    Example:
      >>> import numpy as np
      >>> from capsjax.data.stored import a_tenth_of_each_class
      >>> int(a_tenth_of_each_class(np.array([0] * 30 + [1] * 5 + [2])).sum())
      4
    """
    rng, chosen = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in range(int(labels.max(initial=-1)) + 1):
        own = np.flatnonzero(labels == label)
        number = max(1, len(own) // 10) if len(own) > 1 else 0
        chosen[own[rng.permutation(len(own))[:number]]] = True
    return chosen
