"""Reads any image classification set that TFDS has prepared, without TensorFlow.

TFDS describes a prepared set in two JSON files and stores its examples in files of records, each a
serialised ``tf.train.Example``. A scan reads the labels and finds where the records of a TFRecord
file begin; array_record has an index for that. The result of the scan is cached.
"""

import dataclasses
import functools
import glob
import io
import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capsjax.data.dataset import Dataset, StoredSplit
from capsjax.data.decoded_cache import cached_arrays
from capsjax.data.image_files import CHANNELS, image_pixels, text_of_shape
from capsjax.data.stored import StoredImages, a_tenth_of_each_class
from capsjax.data.tfds_source import import_tfds, only_own_features
from capsjax.errors import DataError

PREFIX = "tfds:"
_SPLITS = ("train", "test", "validation")
_FORMATS = ("array_record", "tfrecord")
_CHUNK = 1000  # records per read
# A TFRecord is a uint64 length, its checksum, the record, and its checksum.
_HEADER, _FOOTER = struct.Struct("<QI"), 4

_log = logging.getLogger(__name__)


def open_prepared(
    name: str,
    data_dir: Path | None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """Opens a prepared set, whose images are read on demand.

    Test images are those of the split ``test``, or else of ``validation``. If neither exists with
    labels, they are a tenth of each class of ``train``, chosen by a fixed seed.

    Args:
      name: ``NAME[/CONFIG][:VERSION]``, as TFDS writes it.
      data_dir: TFDS's data directory; its default when None.
      image_size: rows and columns. Each image is scaled, and its longer side cropped at both ends.
        When None, all images must have the same size, which is kept.
      channels: 1, 3 or 4; when None, the number that the set declares.

    Raises:
      DataError: the set is not prepared, or damaged; its examples do not have one image and one
        class each; or its images differ in size.
    """
    tfds = import_tfds()
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    folder = _find(name, root)
    try:
        with only_own_features(tfds):
            info = tfds.builder_from_directory(folder).info
            image, label = _features(name, info.features)
        splits = {
            split: _Records.make(name, split, info) for split in _SPLITS if split in info.splits
        }
        if "train" not in splits:
            raise DataError(
                f"data set {name} in {folder} must have a split train, got {', '.join(info.splits)}"
            )
        index = _index(name, folder, splits, label)
        source = _source(name, image, info.features[image], image_size, channels)
        stored = {}
        for split, records in splits.items():
            labels = index[f"{split}_labels"]
            if split == "train" or (labels >= 0).all():
                records = dataclasses.replace(records, offsets=index.get(f"{split}_offsets"))
                images = StoredImages(source(records), np.arange(len(labels)))
                stored[split] = StoredSplit(images, labels)
        class_names = tuple(info.features[label].names)
    except DataError:
        raise
    except Exception as error:  # TFDS, array_record and damaged files raise many kinds
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"data set {name} in {folder} is damaged or incomplete ({type(error).__name__}: {text})"
        ) from None
    train = stored["train"]
    test = stored.get("test", stored.get("validation"))
    if test is None:
        chosen = a_tenth_of_each_class(train.labels)
        train, test = (train.take(np.flatnonzero(x)) for x in (~chosen, chosen))
        _log.info("%s has no labelled test images: tests on a tenth of each class", name)
    return Dataset(f"{PREFIX}{name}", train, test, class_names)


def _find(name: str, root: Path) -> Path:
    """Returns the folder of a set, by default its latest version and only configuration.

    Raises:
      DataError: the set is not prepared, or ambiguous; the message names the prepared ones.
    """
    if ".." in name or not re.fullmatch(r"\w[^/:*]*(/[^/:*]+)*(:\d+(\.\d+)*)?", name):
        raise DataError(f"a TFDS set must be named like NAME[/CONFIG][:VERSION], got {name!r}")
    path, _, version = name.partition(":")
    prepared = _versions(root, f"{glob.escape(path)}/**")
    if version:
        prepared = [folder for folder in prepared if folder.name == version]
    if len({folder.parent for folder in prepared}) == 1:
        return max(prepared, key=lambda folder: [int(n) for n in folder.name.split(".")])
    found = prepared or _versions(root, "**")
    names = ", ".join(f"{x.relative_to(root).parent.as_posix()}:{x.name}" for x in found)
    if prepared:
        raise DataError(f"data set {name} has several configurations; name one of {names}")
    raise DataError(f"data set {name} is not prepared in {root}; prepared there: {names or 'none'}")


def _versions(root: Path, pattern: str) -> list[Path]:
    """Folders of prepared versions; others are left by a preparation that was interrupted."""
    folders = (file.parent for file in root.glob(f"{pattern}/dataset_info.json"))
    return sorted(folder for folder in folders if re.fullmatch(r"\d+(\.\d+)*", folder.name))


def _features(name: str, features: Any) -> tuple[str, str]:
    """Returns the names of the features for the image and its class."""
    kinds = {key: type(feature).__name__ for key, feature in dict(features).items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
        raise DataError(
            f"data set {name} must have one Image and one ClassLabel feature, got {found}"
        )
    return images[0], labels[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Records:
    """The records of a split.

    Attributes:
      of: names of the set and the split.
      files: paths of the files, with the number of records in each.
      format: array_record or tfrecord.
      offsets: offset of each record in its file, for tfrecord; None if not known yet.
    """

    of: str
    files: tuple[tuple[str, int], ...]
    format: str
    offsets: npt.NDArray[np.int64] | None = None

    @classmethod
    def make(cls, name: str, split: str, info: Any) -> "_Records":
        """Describes a split's records; raises a DataError if their format is unsupported."""
        found = info.splits[split]
        file_format = info.file_format.value
        if file_format not in _FORMATS:
            raise DataError(
                f"data set {name} is prepared as {file_format}, expected {' or '.join(_FORMATS)}"
            )
        files = zip(map(str, found.filepaths), found.shard_lengths, strict=True)
        return cls(f"{name}, split {split}", tuple(files), file_format)

    def __len__(self) -> int:
        return sum(number for _, number in self.files)

    @functools.cached_property
    def checksum(self) -> int:
        """CRC-32 of the files' names, sizes and numbers of records."""
        about = [
            (Path(file).name, Path(file).stat().st_size, number) for file, number in self.files
        ]
        return zlib.crc32(repr(about).encode())

    def begins(self) -> npt.NDArray[np.int64]:
        """Finds the offsets of the records of TFRecord files."""
        offsets = []
        for path, number in self.files:
            with open(path, "rb") as file:
                offset = 0
                for _ in range(number):
                    offsets.append(offset)
                    file.seek(offset)
                    length, _ = _HEADER.unpack(file.read(_HEADER.size))
                    offset += _HEADER.size + length + _FOOTER
        return np.array(offsets, np.int64)

    def read(self, numbers: Sequence[int]) -> Sequence[bytes]:
        """Reads the records with these numbers."""
        if self.format == "array_record":
            return self._array_records.__getitems__(numbers)
        assert self.offsets is not None
        ends = np.cumsum([number for _, number in self.files])
        records = []
        for number, shard in zip(numbers, np.searchsorted(ends, numbers, "right"), strict=True):
            with open(self.files[shard][0], "rb", buffering=0) as file:
                file.seek(self.offsets[number])
                length, _ = _HEADER.unpack(file.read(_HEADER.size))
                records.append(file.read(length))
        return records

    @functools.cached_property
    def _array_records(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([f"{path}[0:{number}]" for path, number in self.files])

    def __getstate__(self) -> dict[str, Any]:
        # Open files are not sent to other processes.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _index(
    name: str, folder: Path, splits: dict[str, _Records], label: str
) -> dict[str, npt.NDArray[Any]]:
    """Returns the labels of each split, and offsets of TFRecord files, cached or by a scan."""
    names = [f"{split}_labels" for split in splits]
    names += [f"{split}_offsets" for split, r in splits.items() if r.format == "tfrecord"]

    def scan() -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {}
        for split, records in splits.items():
            _log.info("reading the labels of %s %s, %s images", name, split, f"{len(records):,}")
            if records.format == "tfrecord":
                arrays[f"{split}_offsets"] = records.begins()
                records = dataclasses.replace(records, offsets=arrays[f"{split}_offsets"])
            labels: list[int] = []
            for first in range(0, len(records), _CHUNK):
                numbers = range(first, min(first + _CHUNK, len(records)))
                labels += (
                    _example(record)[label].int64_list.value[0] for record in records.read(numbers)
                )
            arrays[f"{split}_labels"] = np.array(labels, np.int32)
        return arrays

    return cached_arrays(folder, f"{folder.parent.name}-{folder.name}-index", names, scan)


def _example(record: bytes) -> Any:
    """Returns the features of a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """Decodes a split's images; see :class:`capsjax.data.stored.ImageSource`."""

    records: _Records
    feature: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    size: tuple[int, int] | None

    @property
    def checksum(self) -> int:
        """CRC-32 of the files' names, sizes and numbers of records."""
        return self.records.checksum

    def read(self, numbers: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
        """Reads and decodes images."""
        from PIL import Image

        for number, record in zip(numbers, self.records.read(numbers), strict=True):
            where = f"image {number} of data set {self.records.of}"
            try:
                encoded = _example(record)[self.feature].bytes_list.value[0]
                with Image.open(io.BytesIO(encoded)) as image:
                    pixels = image_pixels(image, size=self.size, channels=self.shape[2])
            except Exception as error:  # Pillow and protobuf raise many kinds for damaged bytes
                raise DataError(f"{where} cannot be read: {error}") from None
            if pixels.shape != self.shape or pixels.dtype != self.dtype:
                raise DataError(
                    f"{where} must be {self.dtype} {text_of_shape(self.shape)}, got {pixels.dtype}"
                    f" {text_of_shape(pixels.shape)}"
                )
            yield pixels


def _source(
    name: str, key: str, feature: Any, image_size: int | None, channels: int | None
) -> Callable[[_Records], _Source]:
    """Returns a function that makes the image source of a split, with the images' shape."""
    rows, columns, depth = feature.shape
    if image_size is None and None in (rows, columns):
        raise DataError(f"data set {name} has images of several sizes; --image-size scales them")
    if (channels or depth) not in CHANNELS:
        raise DataError(f"data set {name} has images of {depth} channels; --channels converts them")
    dtype = np.dtype(feature.np_dtype)
    if dtype not in (np.uint8, np.uint16):
        raise DataError(f"data set {name} must have images of uint8 or uint16, got {dtype}")
    size = None if image_size is None else (image_size, image_size)
    shape = (*(size or (rows, columns)), channels or depth)
    return lambda records: _Source(records, key, shape, dtype, size)
