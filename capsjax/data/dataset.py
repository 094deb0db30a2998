"""The type that every data source returns."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from capsjax.data.stored import StoredImages
from capsjax.data.tasks import Shifted, Task


class Split(NamedTuple):
    """One split of a data set, entirely in memory.

    Attributes:
      images: ``[N, H, W, C]``: uint8 from 0 to 255, uint16 from 0 to 65535, or float32 in [0, 1].
      labels: class indices, int32 ``[N]``; classes that an image shows, bool ``[N, J]``; or numbers
        to predict, float32 ``[N, J]``.
    """

    images: npt.NDArray[Any]
    labels: npt.NDArray[np.int32] | npt.NDArray[np.bool_] | npt.NDArray[np.float32]

    def take(self, indices: npt.NDArray[Any]) -> Self:
        """Returns the examples with these indices."""
        return self._replace(images=self.images[indices], labels=self.labels[indices])

    def read(self) -> "Split":
        """Returns the split itself, to match :meth:`StoredSplit.read`."""
        return self


class StoredSplit(NamedTuple):
    """One split of a data set whose images are read on demand.

    Attributes:
      images: the stored images.
      labels: as in :class:`Split`, in memory.
    """

    images: StoredImages
    labels: npt.NDArray[np.int32] | npt.NDArray[np.bool_] | npt.NDArray[np.float32]

    def take(self, indices: npt.NDArray[Any]) -> Self:
        """Returns the examples with these indices, without reading them."""
        return self._replace(images=self.images.take(indices), labels=self.labels[indices])

    def read(self) -> Split:
        """Reads the images into memory.

        Raises:
          DataError: an image cannot be read; the message names it.
        """
        return Split(self.images.read(), self.labels)


AnySplit = Split | StoredSplit


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set of labelled images.

    Attributes:
      name: name of the set, as in :func:`load`.
      train: training split.
      test: test split.
      class_names: one name per class, in the order of the labels; for regression, one per number.
      task: how the network's inputs and targets are made from the images.
      test_files: files of the test images, if each has its own; None otherwise.

    Raises:
      TypeError: labels are not an array.
      ValueError: a split does not have the shapes, dtypes and values of :class:`Split`, the images
        of the two splits differ in shape or do not suit the task, a label has no class name, two
        classes have the same name, the task draws pairs and a split is not sorted by class, or a
        test image has no file.

    Example:
      >>> import numpy as np
      >>> from capsjax.data import Dataset, Split
      >>> split = Split(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1], np.int32))
      >>> Dataset("tiny", train=split, test=split, class_names=("cat", "dog"))
      Dataset('tiny': 2 train and 2 test images of 8x8x1, 2 classes)
    """

    name: str
    train: AnySplit
    test: AnySplit
    class_names: tuple[str, ...]
    task: Task = dataclasses.field(default_factory=Shifted)
    test_files: Sequence[str] | None = None

    def __post_init__(self) -> None:
        names, counts = np.unique(self.class_names, return_counts=True)
        if twice := names[counts > 1].tolist():
            raise ValueError(f"class_names must differ, got {twice[0]!r} more than once")
        for split_name in ("train", "test"):
            images, labels = getattr(self, split_name)
            if images.dtype not in (np.uint8, np.uint16, np.float32) or images.ndim != 4:
                raise ValueError(
                    f"{split_name}.images must be uint8, uint16 or float32 [N, H, W, C], "
                    f"got {images.dtype} {list(images.shape)}"
                )
            if not hasattr(labels, "dtype"):
                what = type(labels).__name__
                raise TypeError(f"{split_name}.labels must be an int32 array, got {what}")
            if isinstance(images, np.ndarray) and images.dtype == np.float32 and images.size:
                low, high = images.min(), images.max()
                if not (low >= 0 and high <= 1):  # also if one of them is NaN
                    raise ValueError(
                        f"{split_name}.images must lie in [0, 1] as float32, got {low}..{high}"
                    )
            several = (len(images), self.num_classes)
            if (labels.dtype, labels.shape) not in (
                (np.int32, several[:1]),
                (np.bool_, several),
                (np.float32, several),
            ):
                raise ValueError(
                    f"{split_name}.labels must be int32 {list(several[:1])}, or bool or float32 "
                    f"{list(several)}, got {labels.dtype} {list(labels.shape)}"
                )
            if labels.dtype == np.float32 and not np.isfinite(labels).all():
                raise ValueError(f"{split_name}.labels must be finite")
            if (
                labels.dtype == np.int32
                and labels.size
                and not 0 <= labels.min() <= labels.max() < self.num_classes
            ):
                raise ValueError(
                    f"{split_name}.labels must lie in 0..{self.num_classes - 1}, "
                    f"got {labels.min()}..{labels.max()}"
                )
        if self.train.labels.dtype != self.test.labels.dtype:
            raise ValueError(
                "labels of both splits must have the same dtype, got"
                f" {self.train.labels.dtype} and {self.test.labels.dtype}"
            )
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ValueError(
                "test images must have the shape of train images,"
                f" {list(self.train.images.shape[1:])}, "
                f"got {list(self.test.images.shape[1:])}"
            )
        if self.test_files is not None and len(self.test_files) != len(self.test.images):
            raise ValueError(
                f"test_files must name all {len(self.test.images)} test images,"
                f" got {len(self.test_files)}"
            )
        self.task.image_shape(self.train.images.shape[1:])
        if self.task.classes_per_image > 1:
            for split_name in ("train", "test"):
                labels = getattr(self, split_name).labels
                if labels.ndim > 1:
                    raise ValueError(f"{split_name}.labels must be class indices to draw pairs")
                if labels.size and (labels[0] == labels[-1] or (np.diff(labels) < 0).any()):
                    raise ValueError(
                        f"{split_name}.labels must be sorted and have several classes to draw pairs"
                    )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def has_several_classes(self) -> bool:
        """Whether an image may show several classes."""
        return self.task.classes_per_image > 1 or self.train.labels.dtype == np.bool_

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict, instead of classes."""
        return self.train.labels.dtype == np.float32

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the network's inputs."""
        height, width, channels = self.train.images.shape[1:]
        return self.task.image_shape((height, width, channels))

    def __repr__(self) -> str:
        # The generated representation would print the pixels.
        shape = "x".join(map(str, self.image_shape))
        return (
            f"Dataset({self.name!r}: {len(self.train.images)} train and {len(self.test.images)} "
            f"test images of {shape}, {self.num_classes} classes)"
        )
