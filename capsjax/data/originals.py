"""Reads the original files of TFDS data sets without TensorFlow.

The records and their order are those of the stock builders. Images are encoded as PNG, which TFDS
stores without decoding.
"""

import gzip
import io
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urljoin

import numpy as np

Urls = dict[str, dict[str, str]]
Paths = Mapping[str, str]


class Originals(Protocol):
    """Locates and reads the original files of a set, and converts records to examples."""

    def urls(self, builder: Any) -> Urls:
        """Returns URLs by split and by a name for each file."""
        ...

    def class_names(self, paths: Paths) -> list[str] | None:
        """Returns the class names if the files hold them; None if the builder does."""
        ...

    def records(self, paths: Paths, split: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a split, in order."""
        ...

    def example(self, record: Any) -> tuple[np.ndarray, Any]:
        """Returns image, uint8 ``[H, W, C]``, and label of a decoded record."""
        ...


class IdxFiles:
    """MNIST and its siblings: gzip-compressed IDX files."""

    _FILES: ClassVar = {
        "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    }

    def urls(self, builder: Any) -> Urls:
        """Two files for each split."""
        return {
            split: {"images": urljoin(builder.URL, images), "labels": urljoin(builder.URL, labels)}
            for split, (images, labels) in self._FILES.items()
        }

    def class_names(self, paths: Paths) -> None:
        """None: the builder has them."""

    def records(self, paths: Paths, split: str) -> Iterator[dict[str, Any]]:
        """Yields image and label."""
        pixels, numbers = read_idx(paths["images"]), read_idx(paths["labels"])
        if len(pixels) != len(numbers):
            raise ValueError(f"{len(pixels)} images but {len(numbers)} labels")
        for image, label in zip(pixels, numbers, strict=True):
            yield {"image": _png(image), "label": int(label)}

    def example(self, record: Any) -> tuple[np.ndarray, Any]:
        """Returns the unchanged image and the label."""
        return record["image"], record["label"]


class CifarArchive:
    """CIFAR-10: a tar archive of binary files with 10,000 records, each a label and 3072 pixels."""

    _FOLDER = "cifar-10-batches-bin"
    _FILES: ClassVar = {
        "train": [f"data_batch_{n}.bin" for n in range(1, 6)],
        "test": ["test_batch.bin"],
    }
    _SHAPE = (3, 32, 32)

    def urls(self, builder: Any) -> Urls:
        """One archive for both splits."""
        return {split: {"archive": builder._cifar_info.url} for split in self._FILES}

    def class_names(self, paths: Paths) -> list[str]:
        """The names in the archive."""
        return self._read(paths, "batches.meta.txt").decode().split()

    def records(self, paths: Paths, split: str) -> Iterator[dict[str, Any]]:
        """Yields id, image and label."""
        number = 0
        for file in self._FILES[split]:
            rows = np.frombuffer(self._read(paths, file), np.uint8)
            for row in rows.reshape(-1, 1 + int(np.prod(self._SHAPE))):
                image = row[1:].reshape(self._SHAPE).transpose(1, 2, 0)
                yield {"id": f"{split}_{number:05d}", "image": _png(image), "label": int(row[0])}
                number += 1

    def example(self, record: Any) -> tuple[np.ndarray, Any]:
        """Returns the unchanged image and the label."""
        return record["image"], record["label"]

    def _read(self, paths: Paths, name: str) -> bytes:
        with tarfile.open(paths["archive"], "r:*") as archive:
            file = archive.extractfile(f"{self._FOLDER}/{name}")
            if file is None:
                raise ValueError(f"archive must hold a file {name}, got none")
            return file.read()


class SvhnFiles:
    """Street View House Numbers, cropped: MATLAB files, in which the digit 0 has the label 10."""

    def urls(self, builder: Any) -> Urls:
        """One file for each split, including ``extra``."""
        base = _constant(builder, "URL")
        return {
            split: {"file": urljoin(base, f"{split}_32x32.mat")}
            for split in ("train", "test", "extra")
        }

    def class_names(self, paths: Paths) -> None:
        """None: the builder has them."""

    def records(self, paths: Paths, split: str) -> Iterator[dict[str, Any]]:
        """Yields id, image and label."""
        from scipy.io import loadmat

        data = loadmat(paths["file"])
        images, labels = np.moveaxis(data["X"], -1, 0), data["y"].reshape(-1)
        if labels.size and not 1 <= labels.min() <= labels.max() <= 10:
            raise ValueError(f"labels must lie in 1..10, got {labels.min()}..{labels.max()}")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield {"id": f"{split}_{number:06d}", "image": _png(image), "label": int(label) % 10}

    def example(self, record: Any) -> tuple[np.ndarray, Any]:
        """Returns the unchanged image and the label."""
        return record["image"], record["label"]


class NorbFiles:
    """smallNORB: gzip-compressed binary matrices of stereo pairs, categories and conditions."""

    _TYPES: ClassVar[dict[int, np.dtype[Any]]] = {
        0x1E3D4C55: np.dtype("u1"),
        0x1E3D4C54: np.dtype("<i4"),
    }

    def urls(self, builder: Any) -> Urls:
        """Three files for each split."""
        templates = {
            "train": _constant(builder, "_TRAINING_URL_TEMPLATE"),
            "test": _constant(builder, "_TESTING_URL_TEMPLATE"),
        }
        return {
            split: {kind: template.format(type=kind) for kind in ("dat", "cat", "info")}
            for split, template in templates.items()
        }

    def class_names(self, paths: Paths) -> None:
        """None: the builder has them."""

    def records(self, paths: Paths, split: str) -> Iterator[dict[str, Any]]:
        """Yields both images of a pair, category, instance, elevation, azimuth and lighting."""
        pairs, categories, infos = (self.read(paths[kind]) for kind in ("dat", "cat", "info"))
        for (left, right), category, info in zip(pairs, categories, infos, strict=True):
            instance, elevation, azimuth, lighting = map(int, info)
            yield {
                "image": _png(left),
                "image2": _png(right),
                "label_category": int(category),
                "instance": instance,
                "label_elevation": elevation,
                # The file counts steps of 10 degrees; only even numbers occur.
                "label_azimuth": azimuth // 2,
                "label_lighting": lighting,
            }

    def example(self, record: Any) -> tuple[np.ndarray, Any]:
        """Returns both images as channels, averaged to 48 x 48 over 2 x 2 pixels; and category."""
        pair = np.concatenate([record["image"], record["image2"]], axis=-1)
        rows, columns, channels = pair.shape
        blocks = pair.reshape(rows // 2, 2, columns // 2, 2, channels)
        return np.round(blocks.mean((1, 3))).astype(np.uint8), record["label_category"]

    def read(self, path: str) -> np.ndarray:
        """Reads a binary matrix.

        The format is little-endian: a magic number for the dtype, the number of axes, at least
        three sizes (those beyond the number of axes are 1), and the values.
        """
        with gzip.open(path) as file:
            data = file.read()
        magic, axes = np.frombuffer(data, "<i4", count=2)
        if int(magic) not in self._TYPES:
            raise ValueError(f"{Path(path).name} is not a matrix of bytes or integers")
        shape = np.frombuffer(data, "<i4", count=int(axes), offset=8)
        start = 8 + 4 * max(3, int(axes))
        return np.frombuffer(data, self._TYPES[int(magic)], offset=start).reshape(shape)


ORIGINALS: dict[str, Originals] = {
    "mnist": IdxFiles(),
    "fashion_mnist": IdxFiles(),
    "kmnist": IdxFiles(),
    "cifar10": CifarArchive(),
    "svhn_cropped": SvhnFiles(),
    "smallnorb": NorbFiles(),
}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a gzip-compressed IDX file of unsigned bytes, the original format of MNIST.

    The header is two zero bytes, the type (8 for uint8), the number of axes, and each axis's
    length as a big-endian uint32.

    Raises:
      ValueError: the header or the length is wrong.
    """
    with gzip.open(path) as file:
        data = file.read()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{Path(path).name} is not an IDX file of unsigned bytes")
    start = 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    pixels = np.frombuffer(data, np.uint8, offset=start)
    if pixels.size != np.prod(shape):
        raise ValueError(f"{Path(path).name} holds {pixels.size} bytes, expected {shape}")
    return pixels.reshape(shape)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(encoded, format="png")
    return encoded.getvalue()


def _constant(builder: Any, name: str) -> str:
    """Returns a constant of the module that defines the stock builder."""
    stock = next(
        kind for kind in type(builder).__mro__ if kind.__module__.startswith("tensorflow_datasets")
    )
    value: str = getattr(sys.modules[stock.__module__], name)
    return value
