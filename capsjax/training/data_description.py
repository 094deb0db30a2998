"""What a run records of its data set, to know it again."""

import dataclasses
import functools
import zlib

import numpy as np

from capsjax.data import Dataset, Split, StoredSplit
from capsjax.data.dataset import AnySplit
from capsjax.errors import ConfigError
from capsjax.training import processes


@dataclasses.dataclass(frozen=True)
class DataDescription:
    """Identifies a data set.

    Attributes:
      name: its name.
      class_names: its classes, in the order of the labels.
      train_images: number of training images.
      checksum: CRC-32 of the training images and labels; None if the images were on disk.
      test_images: number of test images; this and what follows is None in descriptions by older
        versions.
      test_checksum: CRC-32 of the test images and labels; None if the images were on disk.
      task: name of the task's class.
      label_dtype: dtype of the labels: int32, bool (several classes), float32 (numbers to predict).
      labels: CRC-32 of the labels for training and test.
      files: CRC-32 of what identifies images on disk, such as names and sizes of files; None if the
        images were in memory.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: int
    checksum: int | None
    test_images: int | None = None
    test_checksum: int | None = None
    task: str | None = None
    label_dtype: str | None = None
    labels: int | None = None
    files: int | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> "DataDescription":
        """Describes a data set."""
        return cls(
            dataset.name,
            dataset.class_names,
            len(dataset.train.labels),
            _checksum(dataset.train),
            len(dataset.test.labels),
            _checksum(dataset.test),
            type(dataset.task).__name__,
            dataset.train.labels.dtype.name,
            _crc(dataset.train.labels, dataset.test.labels),
            _files(dataset),
        )

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict, instead of classes."""
        return self.label_dtype == "float32"

    def completed(self, found: "DataDescription") -> "DataDescription":
        """Returns this description with the parts that an older version did not record."""
        if self.labels is not None:
            return self
        known = {n: v for n, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(found, **known)

    def check(self, found: "DataDescription") -> None:
        """Raises a ConfigError if the data found are not those that the run was started with.

        Attributes that only one of them has are not compared.
        """
        for field in dataclasses.fields(self)[1:]:  # the name may differ
            then, now = getattr(self, field.name), getattr(found, field.name)
            if None not in (then, now) and then != now:
                raise ConfigError(
                    f"data set {found.name} is not the one that the run was started with:"
                    f" {field.name.replace('_', ' ')} were {then}, are {now}"
                )

    def check_alike(self) -> None:
        """Raises a ConfigError in all processes unless they have the same data."""
        values = dataclasses.asdict(self).items()
        named = {f"data {name.replace('_', ' ')}": value for name, value in values}
        processes.check_alike(named, what="data")


def _crc(*arrays: np.ndarray) -> int:
    return functools.reduce(lambda crc, x: zlib.crc32(np.ascontiguousarray(x).data, crc), arrays, 0)


def _checksum(split: AnySplit) -> int | None:
    return _crc(*split) if isinstance(split, Split) else None


def _files(dataset: Dataset) -> int | None:
    splits = (dataset.train, dataset.test)
    checksums = [split.images.checksum for split in splits if isinstance(split, StoredSplit)]
    return _crc(np.array(checksums)) if checksums else None
